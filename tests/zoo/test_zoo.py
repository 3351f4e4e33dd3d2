"""Networks of public packages: converted, trained, folded and reverted, and counted.

`pytest -m soak -s tests/zoo` runs all of them and prints a line for each.
"""

import pytest
from judge import Verdict, judge
from networks import NETWORKS, make

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages

# One network of each kind of forward, the cheapest of its kind.
FEW = {
    "timm": ("mobilenetv3_small_050", "dla46x_c"),
    "transformers": ("resnet_basic", "mobilevit", "textnet"),
    "monai": ("unet_residual", "basic_unet", "attention_unet", "seg_resnet", "densenet"),
    "segmentation_models_pytorch": ("unet_timm_mobilenetv3",),
}
SECONDS = 1.0  # of one core, for a conversion


@pytest.mark.slow
@pytest.mark.parametrize("package", FEW)
def test_a_few_networks(package):
    check({name: judged(package, name) for name in FEW[package]})


@pytest.mark.soak
def test_all_networks():
    names = [(package, name) for package, networks in NETWORKS.items() for name in networks]
    check({f"{package}: {name}": judged(package, name) for package, name in names})


def judged(package: str, name: str) -> Verdict:
    return judge(*make(package, name))


def check(verdicts: dict[str, Verdict]) -> None:
    """Prints the counts, and fails if one is low, a value differs or a conversion takes long."""
    for name, verdict in verdicts.items():
        print(f"\n{name}: {verdict}", end="")
    found = verdicts.values()
    mismatches = {name: v.mismatches for name, v in verdicts.items() if v.mismatches}
    assert not mismatches, mismatches
    assert max(verdict.seconds for verdict in found) <= SECONDS
    for what, least, total, left in (
        ("converted", 0.99, sum(v.batch_norms for v in found), [v.not_converted for v in found]),
        ("fused", 0.97, sum(v.fusable for v in found), [v.not_fused for v in found]),
        ("folded", 0.95, sum(v.foldable for v in found), [v.not_folded for v in found]),
    ):
        done = total - sum(map(len, left))
        print(f"\n{what}: {done} of {total}", end="")
        assert done >= least * total, dict(zip(verdicts, left, strict=True))
