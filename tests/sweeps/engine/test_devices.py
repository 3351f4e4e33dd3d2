"""Which worker sees which GPUs, on made-up machines."""

import pytest

from bn_lightning.sweeps.engine.devices import count_devices, sharing_notice, worker_devices
from bn_lightning.sweeps.engine.sweep_error import SweepError

CUDA, HIP, ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"

# Workers, devices of each, the environment, GPUs of the machine: what each worker sees.
CASES = {
    "one_each": (2, None, {}, 4, CUDA, ["0", "1"]),
    "two_each": (2, 2, {}, 5, CUDA, ["0,1", "2,3"]),
    "shared": (5, None, {}, 2, CUDA, ["0", "1", "0", "1", "0"]),
    "pairs_shared": (3, 2, {}, 4, CUDA, ["0,1", "2,3", "0,1"]),
    "inside_another_choice": (2, None, {CUDA: "3, 5,7"}, 8, CUDA, ["3", "5"]),
    "uuids": (2, 1, {CUDA: "GPU-8f3a-1,GPU-77"}, 8, CUDA, ["GPU-8f3a-1", "GPU-77"]),
    "mig": (2, 1, {CUDA: "MIG-a/1/0,MIG-b"}, 1, CUDA, ["MIG-a/1/0", "MIG-b"]),
    "ends_at_an_invalid_name": (2, None, {CUDA: "2,-1,3"}, 8, CUDA, ["2", "2"]),
    "hip": (2, None, {HIP: "1,2", ROCR: "4,5,6"}, 8, HIP, ["1", "2"]),
    "rocr": (2, None, {ROCR: "4,GPU-6"}, 8, HIP, ["0", "1"]),
    "all_hidden": (2, None, {CUDA: ""}, 8, None, []),
    "slurm_without_gpus": (2, None, {CUDA: "NoDevFiles"}, 8, None, []),
    "no_gpu": (2, None, {}, 0, None, []),
    "left_alone": (2, 0, {CUDA: "1,2"}, 8, None, []),
}


@pytest.mark.parametrize(
    ("workers", "each", "environment", "count", "variable", "seen"), CASES.values(), ids=CASES
)
def test_each_worker_sees_its_own(workers, each, environment, count, variable, seen):
    found = worker_devices(workers, each, environment, lambda: count)
    assert found == ([{variable: name} for name in seen] if seen else [{}] * workers)


@pytest.mark.parametrize("environment", [{}, {CUDA: "7"}], ids=["machine", "outer"])
def test_more_than_there_are_is_refused(environment):
    with pytest.raises(SweepError, match=r"`hydra.sweeper.devices_per_job` to be at most 1.*got 2"):
        worker_devices(1, 2, environment, lambda: 1)


def test_sharing_is_told():
    assert sharing_notice(worker_devices(2, None, {}, lambda: 2)) is None
    assert sharing_notice(worker_devices(2, None, {}, lambda: 0)) is None
    assert "3 workers share the GPUs 0, 1" in str(
        sharing_notice(worker_devices(3, None, {}, lambda: 2))
    )


def test_the_devices_of_this_machine_are_counted():
    assert count_devices() >= 0
