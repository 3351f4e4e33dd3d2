"""Digests of published data sets in IDX files.

A digest is that of the decompressed payload, because gzip can compress the same bytes differently.
It has pooch's format: a hexadecimal SHA-256, or "md5:" and a hexadecimal MD5.
"""

import hashlib

from pooch.hashes import hash_algorithm

MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# We found no published SHA-256 of these payloads. The MD5 are keys of the git-annex repository
# github.com/datasets-mila/datasets--fashionmnist.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "md5:9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "md5:8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "md5:15d484375f8d13e6eb1aabb0c3f46965",
}
PUBLISHED = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST}
"""Folder of a data set -> name of each file -> digest."""


def mismatch(payload: bytes, digest: str) -> str | None:
    """Describe how a payload differs from the one with this digest; None if it does not.

    The description names the published file with this payload, if there is one.
    """
    algorithm, got = hash_algorithm(digest), _digest_like(digest, payload)
    if got == digest:
        return None
    text = (
        f"expected {algorithm} {_hexadecimal(digest)} of the decompressed payload, got"
        f" {_hexadecimal(got)} ({len(payload)} bytes)"
    )
    for source, digests in PUBLISHED.items():
        for name, published in digests.items():
            if _digest_like(published, payload) == published:
                return f"{text}, the file {source}/{name}"
    return text


def _digest_like(digest: str, payload: bytes) -> str:
    value = hashlib.new(hash_algorithm(digest), payload, usedforsecurity=False).hexdigest()
    return digest.removesuffix(_hexadecimal(digest)) + value


def _hexadecimal(digest: str) -> str:
    return digest.rpartition(":")[2]
