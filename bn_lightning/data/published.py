"""Digests of published data sets in IDX files, and what a file is by them.

A digest is that of the decompressed payload, as gzip wraps the same bytes in many ways: hexadecimal
SHA-256, or MD5 with "md5:" before it, as pooch writes them.
"""

import hashlib

MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# No SHA-256 of these payloads was found published. Their MD5 are keys of the git-annex repository
# github.com/datasets-mila/datasets--fashionmnist, as those of Zalando's gzip files are.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "md5:9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "md5:8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "md5:15d484375f8d13e6eb1aabb0c3f46965",
}
PUBLISHED = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST}
"""Name of a data set, which is its folder's, -> name of each file -> digest."""

_LABELS = {"sha256": "SHA-256", "md5": "MD5"}


def algorithm_of(digest: str) -> str:
    """The algorithm that a digest says it is of: "sha256" or "md5".

    Raises:
        ValueError: it names another.
    """
    algorithm = digest.rpartition(":")[0] or "sha256"
    if algorithm not in _LABELS:
        raise ValueError(f"Expected a SHA-256, or an MD5 after md5:, but got {digest!r}")
    return algorithm


def digest_of(payload: bytes, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a payload, without the name of its algorithm."""
    return hashlib.new(algorithm, payload, usedforsecurity=False).hexdigest()


def mismatch(payload: bytes, digest: str) -> str | None:
    """What is wrong with a payload that should have this digest, None if it has.

    A payload of another published file is called by its name.
    """
    algorithm = algorithm_of(digest)
    expected, got = digest.rpartition(":")[2], digest_of(payload, algorithm)
    if got == expected:
        return None
    text = (
        f"expected {_LABELS[algorithm]} {expected} of the decompressed payload, got {got}"
        f" ({len(payload)} bytes)"
    )
    name = recognised(payload)
    return f"{text}: it is {name}, which belongs into that folder" if name else text


def recognised(payload: bytes) -> str | None:
    """Folder and name of the published file with this payload, None if it is none of them."""
    found = {algorithm: digest_of(payload, algorithm) for algorithm in _LABELS}
    for source, digests in PUBLISHED.items():
        for name, digest in digests.items():
            if found[algorithm_of(digest)] == digest.rpartition(":")[2]:
                return f"{source}/{name}"
    return None
