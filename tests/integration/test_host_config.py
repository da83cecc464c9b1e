"""What hosts are started with, as it shows in real ones: families, memory, devices."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.fakes.family import fake_spec
from tests.hosts import LivePool, code
from tests.live import LiveFarm
from workers.hosts.checks import count_gpus
from workers.hosts.config import HostConfig
from workers.hosts.devices import has_torch_for_gpus, visible_gpus


def test_hosts_of_fake_families_import_no_torch(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host = live.ready()[0].id
    live.run(host, live.spec(), "x")
    assert "torch" not in Path(f"/proc/{live.process(host).pid}/maps").read_text()


def test_unknown_families_and_missing_files_fail_with_their_reason(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(extra_families={})
    part = live.run(live.ready()[0].id, live.spec(), "a")[0]
    assert "no model family 'fake'" in (part.error or {})["message"]
    live = start_pool()
    missing = fake_spec(path=live.files / "nowhere")
    part = live.run(live.ready()[0].id, missing, "a")[0]
    assert code(part) == "MODEL_LOAD_FAILED"


def test_a_zygote_that_cannot_import_still_serves_what_it_can(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(preimport=("no_such_module_anywhere",))
    assert code(live.run(live.ready()[0].id, live.spec(), "x")[0]) is None


def test_the_least_recently_used_model_leaves_for_room(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(device_memory=2_500_000)
    host = live.ready()[0].id
    specs = [live.spec(f"fake/m{number}") for number in range(3)]
    for spec in (specs[0], specs[1], specs[0], specs[2]):
        assert code(live.run(host, spec, "x")[0]) is None
    assert set(live.pool.hosts()[0].resident) == {specs[0].digest, specs[2].digest}
    assert [(event, digest) for _, digest, event, _ in live.events.models if event == "evicted"] == [
        ("evicted", specs[1].digest)
    ]


def test_a_hint_without_memory_changes_nothing(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(device_memory=1_500_000)
    host, one, two = live.ready()[0].id, live.spec("fake/one"), live.spec("fake/two")
    live.run(host, one, "warm")
    live.pool.load(host, two)
    assert live.pool.hosts()[0].loading == {two.digest}
    live.until(lambda: not live.pool.hosts()[0].loading, "the end of the hinted load")
    assert set(live.pool.hosts()[0].resident) == {one.digest}
    assert [event for _, _, event, _ in live.events.models] == ["loaded", "skipped"]


def test_hosts_of_one_device_share_its_memory(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(hosts=2, device_memory=4_000_000)
    assert [_budget_bytes(live, view.id) for view in live.ready(2)] == [2_000_000, 2_000_000]


def test_memory_is_measured_when_none_is_set(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(device_memory=None, device_fraction=0.5)
    assert 2**20 < _budget_bytes(live, live.ready()[0].id) < psutil.virtual_memory().total


def test_a_model_larger_than_the_device_is_refused(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(device_memory=500_000)
    part = live.run(live.ready()[0].id, live.spec(), "x")[0]
    assert code(part) == "RESOURCE_EXHAUSTED"
    assert "FARMHAND_DEVICE_MEMORY" in (part.error or {})["message"]


def _budget_bytes(live: LivePool, host: int) -> int:
    """What a host says it may hold, when it refuses a model that no machine could."""
    part = live.run(host, live.spec("fake/huge", bytes=2**60), "x")[0]
    said = re.search(r"the device's budget of ([0-9,]+),", (part.error or {})["message"])
    assert said is not None, part.error
    return int(said[1].replace(",", ""))


def test_a_worker_refuses_a_device_that_is_not_there(redis_url: str, database_url: str, tmp_path: Path) -> None:
    farm = LiveFarm(redis_url, database_url, tmp_path)
    worker = farm.start_worker(ready=False, device="cuda:99")
    try:
        assert worker.process.wait(60) == 1
        assert worker.tail().count("FARMHAND_DEVICE asks for cuda:99") == 1
        assert "Traceback" not in worker.tail()
    finally:
        farm.close()


def test_torch_is_asked_in_a_process_of_its_own_for_the_gpus_it_sees() -> None:
    shown = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert count_gpus(HostConfig()) == (shown if has_torch_for_gpus() else 0)
