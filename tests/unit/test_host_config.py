"""What the settings make of hosts, and which devices are refused, without processes."""

import pytest

from common.errors import SetupError
from common.settings import WorkerSettings, load_settings
from tests.fakes.family import PLACE
from workers.hosts.checks import check_devices
from workers.hosts.config import HostConfig, host_config
from workers.hosts.devices import has_torch_for_gpus, name_devices, share_devices, usable_cores


def test_hosts_follow_the_settings() -> None:
    config = host_config(
        load_settings(WorkerSettings, device="cpu", extra_families=f"fake={PLACE}", preload_families="fake")
    )
    assert config.hosts == usable_cores() >= 1
    assert config.devices == ("cpu",)
    assert config.preimport == ("tests.fakes.family",)
    assert config.batch_max_tokens == 2048
    two = host_config(load_settings(WorkerSettings, device="cuda:1", hosts=2, preload_families=""))
    assert (two.devices, two.hosts, two.preimport, two.batch_max_tokens) == (("cuda:1",), 2, (), 16384)
    assert two.setup().hosts_per_device == 2


def test_devices_are_named_as_torch_names_them() -> None:
    assert name_devices("cpu", 2) == name_devices("auto", 0) == ("cpu",)
    assert name_devices("cuda", 2) == ("cuda:0", "cuda:1")
    assert name_devices("cuda", 0) == ("cuda:0",)
    assert name_devices("cuda:1", 2) == ("cuda:1",)


def _shares(devices: tuple[str, ...], workers: int) -> list[tuple[tuple[str, ...], int]]:
    return [share_devices(devices, number, workers) for number in range(1, workers + 1)]


def test_workers_of_a_machine_with_several_gpus_get_each_its_own() -> None:
    gpus = name_devices("cuda", 4)
    assert _shares(gpus, 4) == [((gpu,), 1) for gpu in gpus]
    assert _shares(gpus, 2) == [(("cuda:0", "cuda:2"), 1), (("cuda:1", "cuda:3"), 1)]
    six = _shares(gpus, 6)
    assert [devices for devices, _ in six] == [(f"cuda:{n}",) for n in (0, 1, 2, 3, 0, 1)]
    assert [sharing for _, sharing in six] == [2, 2, 1, 1, 2, 2]


def test_workers_of_a_machine_without_a_gpu_share_its_cores_and_memory() -> None:
    both = [
        host_config(load_settings(WorkerSettings, device="cpu", workers_here=2, worker_number=number))
        for number in (1, 2)
    ]
    assert [one.hosts for one in both] == [max(1, usable_cores() // 2)] * 2
    assert {one.setup().hosts_per_device for one in both} == {2 * both[0].hosts}


def test_a_worker_beyond_the_number_of_workers_is_refused() -> None:
    with pytest.raises(
        SetupError, match="FARMHAND_WORKER_NUMBER is 3, but FARMHAND_WORKERS_HERE says that there are 2"
    ):
        host_config(load_settings(WorkerSettings, workers_here=2, worker_number=3))


def test_the_cpu_is_always_there() -> None:
    check_devices(HostConfig())


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "mps", ""])
def test_a_device_without_a_name_of_torch_s_is_refused(name: str) -> None:
    config = host_config(load_settings(WorkerSettings, device=name))
    with pytest.raises(SetupError, match=f"FARMHAND_DEVICE is '{name}': it must be auto, cpu, cuda or cuda:N"):
        check_devices(config)


def test_a_device_that_is_not_there_is_refused() -> None:
    """By the build of torch, or by torch itself where it is one for GPUs."""
    with pytest.raises(SetupError, match=r"FARMHAND_DEVICE asks for cuda:99, but .*set it to auto") as refused:
        check_devices(host_config(load_settings(WorkerSettings, device="cuda:99")))
    assert "\n" not in refused.value.message


@pytest.mark.skipif(not has_torch_for_gpus(), reason="the installed torch is a build for CPU")
def test_a_device_that_the_driver_shows_is_not_looked_up() -> None:
    check_devices(HostConfig(devices=("cuda:1",), gpus=2))
