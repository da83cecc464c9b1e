"""Weights as hosts use them: fetched by whoever needs them first, leased while mapped, failures told as they are."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from config_db.spec import ModelSpec
from tests.hosts import LivePool
from tests.hub import COMMIT, GATED, HubStandIn, serving_hub
from tests.services import wait_until
from tests.weights import FILES, KEYS, PINNED, PLACE, REPOSITORY, serving_buckets, setup_in
from workers.weights.resolve import tiers_of

IMPORTS = """
import sys
import workers.app, workers.host.main, workers.weights.resolve
from config_db.spec import Source
from workers.weights.setup import WeightsSetup
workers.weights.resolve.resolve(Source(path=sys.argv[1]), WeightsSetup(model_dirs=(sys.argv[1],))).release()
assert not {"boto3", "botocore", "huggingface_hub", "httpx"} & set(sys.modules), sorted(sys.modules)
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with serving_hub() as stand_in:
        stand_in.repositories[REPOSITORY] = FILES
        for name, value in {"HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}.items():
            monkeypatch.setenv(name, value)
        yield stand_in


def from_hub(live: LivePool) -> ModelSpec:
    return msgspec.structs.replace(live.spec(), source=PINNED)


def test_two_hosts_fetch_a_model_once_and_pruning_waits_for_both(
    hub: HubStandIn, tmp_path: Path, start_pool: Callable[..., LivePool]
) -> None:
    setup = setup_in(tmp_path)
    store = tiers_of(setup).store
    live = start_pool(hosts=2, weights=setup)
    spec = from_hub(live)
    first, second = (view.id for view in live.ready(2))
    batches = [live.send(host, spec, "x") for host in (first, second)]
    live.until(lambda: all(batch in live.events.done for batch in batches), "both answers")
    assert all(live.events.done[batch][0][0].error is None for batch in batches)
    assert hub.fetches("model.safetensors") == 3
    assert not store.remove(PLACE)
    live.process(first).kill()
    live.until(lambda: live.events.lost, "the loss of a host")
    assert not store.remove(PLACE)
    live.process(second).kill()
    wait_until(lambda: store.remove(PLACE), 10, "the files to be free")


def test_an_evicted_model_lets_its_files_go(
    hub: HubStandIn, tmp_path: Path, start_pool: Callable[..., LivePool]
) -> None:
    setup = setup_in(tmp_path)
    store = tiers_of(setup).store
    live = start_pool(weights=setup, device_memory=1_500_000)
    host, spec = live.ready()[0].id, from_hub(live)
    live.run(host, spec, "x")
    assert [entry.in_use for entry in store.entries()] == [True]
    live.run(host, live.spec("fake/other"), "x")
    wait_until(lambda: store.remove(PLACE), 10, "the files to be free")
    assert live.run(host, spec, "x")[0].error is None
    assert hub.fetches("model.safetensors") == 6


def test_a_slow_fetch_keeps_no_other_model_from_being_loaded(
    hub: HubStandIn, tmp_path: Path, start_pool: Callable[..., LivePool]
) -> None:
    hub.stalls["model.safetensors"] = 1000
    live = start_pool(weights=setup_in(tmp_path, silence_s=20.0))
    host, spec = live.ready()[0].id, from_hub(live)
    slow = [live.send(host, spec, "x") for _ in range(2)]
    live.until(lambda: hub.sent, "the fetch to begin")
    assert live.run(host, live.spec("fake/other"), "x")[0].error is None
    assert not [batch for batch in slow if batch in live.events.done]
    hub.stalls.clear()
    hub.released.set()
    live.until(lambda: all(batch in live.events.done for batch in slow), "what waited for the fetch")
    assert [live.events.done[batch][0][0].error for batch in slow] == [None, None]


def test_a_host_fills_the_bucket_beside_serving_and_another_machine_needs_no_hub(
    hub: HubStandIn, tmp_path: Path, start_pool: Callable[..., LivePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with serving_buckets() as (_, url, client):
        client.create_bucket(Bucket="of-hosts")
        bucket = {"bucket": "s3://of-hosts", "bucket_endpoint": url}
        manifest = f"hub/{REPOSITORY}/{COMMIT}/manifest.json"

        def is_filled() -> bool:
            return manifest in [one["Key"] for one in client.list_objects_v2(Bucket="of-hosts").get("Contents", ())]

        first = start_pool(weights=setup_in(tmp_path / "one", **bucket), preimport=("workers.weights.bucket",))
        assert first.run(first.ready()[0].id, from_hub(first), "x")[0].error is None
        wait_until(is_filled, 20, "the bucket to be filled")
        asked = len(hub.asked)
        second = start_pool(weights=setup_in(tmp_path / "two", **bucket))
        assert second.run(second.ready()[0].id, from_hub(second), "x")[0].error is None
        assert len(hub.asked) == asked


def test_why_weights_cannot_be_had_reaches_the_caller_and_other_models_serve_on(
    hub: HubStandIn, tmp_path: Path, start_pool: Callable[..., LivePool]
) -> None:
    hub.repositories[REPOSITORY] = GATED
    live = start_pool(weights=setup_in(tmp_path))
    host, spec = live.ready()[0].id, from_hub(live)
    for _ in range(2):
        error = live.run(host, spec, "x")[0].error
        assert error is not None
        assert error["code"] == "MODEL_LOAD_FAILED"
        assert (error["error_class"], error["permanent"], error["attempts"]) == ("GATED", True, 1)
        assert "HF_TOKEN" in error["remedy"]
        assert len(error["tried"]) == 3
    assert len([path for path in hub.asked if COMMIT in path]) == 1
    assert live.run(host, live.spec("fake/other"), "x")[0].error is None


def test_without_a_bucket_nothing_of_it_is_imported(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
