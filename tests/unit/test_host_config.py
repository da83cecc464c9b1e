"""What the settings make of hosts, and which devices are refused, without processes."""

import pytest

from common.errors import SetupError
from common.settings import WorkerSettings, load_settings
from tests.fakes.family import PLACE
from workers.hosts.checks import check_devices
from workers.hosts.config import HostConfig, host_config
from workers.hosts.devices import has_torch_for_gpus, name_devices, usable_cores


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
