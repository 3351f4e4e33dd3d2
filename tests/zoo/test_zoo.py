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
    check({name: judge(*make(package, name)) for name in FEW[package]})


@pytest.mark.soak
@pytest.mark.parametrize("package", NETWORKS)
def test_all_networks(package):
    check({name: judge(*make(package, name)) for name in NETWORKS[package]})


def check(verdicts: dict[str, Verdict]) -> None:
    """Prints the counts, and fails if a network computes something else or takes long."""
    for name, verdict in verdicts.items():
        print(f"\n{name}: {verdict}", end="")
    mismatches = {name: v.mismatches for name, v in verdicts.items() if v.mismatches}
    assert not mismatches, mismatches
    assert max(verdict.seconds for verdict in verdicts.values()) <= SECONDS
