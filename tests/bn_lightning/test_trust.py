"""What a configuration may build is where an object is defined, not how it is reached."""

import pytest

from bn_lightning.trust import OF_CHECKPOINTS, OF_CONFIGURATIONS, UntrustedError, check_trusted


def target(name, **arguments):
    return {"_target_": name, **arguments}


@pytest.mark.parametrize(
    "name",
    [
        "bn_lightning.models.mlp.MLP",
        "bn_lightning.data.MNISTDataModule",  # defined in bn_lightning.data.mnist
        "bn_lightning.models.normalization.batch_norm",
        "torch.optim.SGD",
        "torch.nn.BatchNorm1d",
    ],
)
def test_classes_and_functions_of_models(name):
    config = {"a": [1, None, target("torch.optim.Adam", b=target(name))], "c": {"d": "os.system"}}
    check_trusted(config, OF_CHECKPOINTS, [], "a file")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("os.system", "got os.system; if you trust it"),
        ("torch.hub.load", "got torch.hub.load; if"),
        ("bn_lightning.train.Path", "which is pathlib.Path"),
        ("bn_lightning.command.os.system", "which is posix.system"),
        ("torch.nn.functional.torch.hub.load", "which is torch.hub.load"),
        ("bn_lightning.run_record.write_json", "which is no class"),
        ("bn_lightning.data.archive.unpack", "which is no class"),
        ("bn_lightning.nothing.Here", "a name that can be found"),
        ("bn_lightningale.Bird", "got bn_lightningale.Bird;"),
        (7, "got 7;"),
    ],
)
def test_what_a_checkpoint_may_not_build(name, reason):
    with pytest.raises(UntrustedError) as error:
        check_trusted({"data": {"x": [target(name)]}}, OF_CHECKPOINTS, [], "best.ckpt")
    assert "`data.x.0._target_` in best.ckpt" in str(error.value) and reason in str(error.value)


def test_the_users_own_names():
    check_trusted(target("collections.Counter"), OF_CONFIGURATIONS, ["collections."], "it")
    check_trusted(target("os.path.join"), OF_CONFIGURATIONS, ["posixpath.", "os."], "it")
    with pytest.raises(UntrustedError, match=r"'trusted=\[posixpath\.\]'"):
        check_trusted(target("os.path.join"), OF_CONFIGURATIONS, ["os."], "it")


def test_ones_own_configuration_may_build_more():
    for name in ("lightning.Trainer", "torch.utils.data.DataLoader", "torchmetrics.MeanMetric"):
        check_trusted(target(name), OF_CONFIGURATIONS, [], "it")
        with pytest.raises(UntrustedError):
            check_trusted(target(name), OF_CHECKPOINTS, [], "it")
