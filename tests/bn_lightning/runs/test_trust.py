"""What a configuration may build is where an object is defined, not how it is reached."""

import contextlib

import pytest
from hydra.utils import instantiate

from bn_lightning.runs.checkpoint import CheckpointError, trusted_config
from bn_lightning.runs.trust import UntrustedError, check_plain, check_trusted


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
    check_trusted(config, [], "a file")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("os.system", "got os.system; if you trust it"),
        ("torch.hub.load", "got torch.hub.load; if"),
        ("bn_lightning.train.Path", "which is pathlib.Path"),
        ("bn_lightning.cli.command.os.system", "which is posix.system"),
        ("torch.nn.functional.torch.hub.load", "which is torch.hub.load"),
        ("bn_lightning.runs.atomic_write.write_json", "which is no class"),
        ("bn_lightning.data.archive.unpack", "which is no class"),
        # They are no networks; others start processes or write files.
        (
            "bn_lightning.conversion.deferred.Deferral",
            "got bn_lightning.conversion.deferred.Deferral; if",
        ),
        ("bn_lightning.sweeps.engine.workers.Workers", "to be a class of bn_lightning.data"),
        (
            "bn_lightning.plugins.metrics_logger.MetricsCSVLogger",
            "to be a class of bn_lightning.data",
        ),
        ("bn_lightning.nothing.Here", "a name that can be found"),
        ("bn_lightningale.Bird", "got bn_lightningale.Bird;"),
        (7, "got 7;"),
        # They run what they are given as soon as they are built.
        ("torch.utils.benchmark.Timer", "got torch.utils.benchmark.Timer; if"),
        ("torch.package.PackageImporter", "got torch.package.PackageImporter; if"),
        ("lightning.pytorch.cli.LightningCLI", "got lightning.pytorch.cli.LightningCLI; if"),
        ("lightning.Trainer", "got lightning.Trainer; if"),
        # Of version 0.1.0, and moved since.
        (
            "bn_lightning.batch_norm.BatchNorm1d",
            "is bn_lightning.modules.batch_norm.BatchNorm1",
        ),
        ("bn_lightning.sync.SyncBatchNorm", "bn_lightning.modules.sync_batch_norm.SyncBatchNorm"),
    ],
)
def test_what_a_checkpoint_may_not_build(name, reason):
    with pytest.raises(UntrustedError) as error:
        check_trusted({"data": {"x": [target(name)]}}, [], "best.ckpt")
    assert "`data.x.0._target_` in best.ckpt" in str(error.value) and reason in str(error.value)


def test_the_users_own_names():
    check_trusted(target("collections.Counter"), ["collections."], "it")
    check_trusted(target("os.path.join"), ["posixpath.", "os."], "it")
    with pytest.raises(UntrustedError, match=r"'trusted=\[posixpath\.\]'"):
        check_trusted(target("os.path.join"), ["os."], "it")


MADE = {"_target_": "os.mkdir", "_args_": ["made"]}
MAKES = "{_target_: os.mkdir, _args_: [made]}"
HIDDEN = {
    "in a list": [MADE],
    "in a tuple": (MADE,),
    "deeper": ([{"a": (MADE,)}],),
    "made by an interpolation": ["${oc.create:{_target_:os.mkdir,_args_:[made]}}"],
    "made of a string": ["${oc.create:'" + MAKES + "'}"],
    "decoded": ["${oc.create:${oc.decode:'" + MAKES.replace(" ", "") + "'}}"],
    "referred to": ["${.1}", MADE],
    "a node for a name": [{"_target_": MADE}],
    "an interpolated name": [{"_target_": "${model.name}", "_args_": ["made"]}],
    "partial": [{**MADE, "_partial_": True, "_convert_": "all", "_recursive_": False}],
}


@pytest.mark.parametrize(("kind", "arguments"), HIDDEN.items(), ids=HIDDEN.keys())
def test_a_command_hidden_in_a_checkpoint_is_not_run(tmp_path, monkeypatch, kind, arguments):
    """All but two of these run when the node is built, which the last line shows."""
    monkeypatch.chdir(tmp_path)
    model = {"_target_": "torch.nn.Sequential", "_args_": arguments, "name": "os.mkdir"}
    config = {"data": {}, "model": model}
    with pytest.raises(UntrustedError, match=r"`model\._args_\.0"):
        trusted_config({"hyper_parameters": {"config": config}}, [], "a.ckpt")
    with contextlib.suppress(Exception):
        instantiate({"model": model})
    assert (tmp_path / "made").exists() is (kind not in ("a node for a name", "partial"))


def test_the_archive_of_a_checkpoints_data_is_left_out():
    """It would be unpacked to where the checkpoint says."""
    data = target("bn_lightning.data.ImageFolderDataModule", root="~", archive="a.ckpt")
    data["name"] = ".local"
    config = {"data": data, "model": {}}
    found = trusted_config({"hyper_parameters": {"config": config}}, [], "a.ckpt")
    assert found["data"] == {**data, "archive": None}
    for hidden in ({**data, "_args_": ["~", ".local", "a.ckpt"]}, [data]):
        with pytest.raises(UntrustedError, match="`data` in a.ckpt to have arguments by name"):
            content = {"hyper_parameters": {"config": {"data": hidden, "model": {}}}}
            trusted_config(content, [], "a.ckpt")


def test_an_interpolation_is_refused_by_name():
    with pytest.raises(UntrustedError, match="`data.root` in a.ckpt to be a plain value"):
        check_plain({"data": {"root": "${oc.env:HOME}"}}, "a.ckpt")


@pytest.mark.parametrize("config", [None, [], "x", {"model": {}}, {"data": {}}])
def test_a_checkpoint_without_a_configuration(config):
    for content in ({"hyper_parameters": {"config": config}}, {"hyper_parameters": 7}, {}):
        with pytest.raises(CheckpointError, match="holds no configuration"):
            trusted_config(content, [], "a.ckpt")
