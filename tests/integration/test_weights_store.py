"""Weights on a machine's disk: the least recently used leave, what is in use stays, what is damaged is not used."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ModelLoadError
from config_db.spec import Source
from tests.hub import COMMIT, HubStandIn, serving_hub
from tests.services import wait_until
from tests.weights import FILES, PINNED, PLACE, REPOSITORY, WEIGHTS, ask_here, begin, contents, setup_in, store_of
from workers.weights.main import Prune, prune
from workers.weights.resolve import resolve, tiers_of
from workers.weights.store import Store

ROOM_FOR_TWO = 700_000
"""A model takes some 310 000 bytes on disk."""


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serving_hub() as stand_in:
        ask_here(stand_in, monkeypatch)
        stand_in.repositories |= {f"farm/{name}": FILES for name in "abc"}
        yield stand_in


def source(name: str) -> Source:
    return Source(hub=f"farm/{name}", revision=COMMIT)


def held(store: Store) -> list[str]:
    return [entry.manifest.source for entry in store.entries()]


def named(*names: str) -> list[str]:
    return [f"hub:farm/{name}@{COMMIT}" for name in names]


def test_the_least_recently_used_leaves_first_and_no_more_than_needed(tmp_path: Path) -> None:
    setup = setup_in(tmp_path, max_bytes=ROOM_FOR_TWO)
    store = tiers_of(setup).store
    for name in ("a", "b", "a", "c"):
        resolve(source(name), setup).release()
    assert held(store) == named("a", "c")


def test_what_is_in_use_stays_and_without_room_a_load_is_refused(hub: HubStandIn, tmp_path: Path) -> None:
    setup = setup_in(tmp_path, max_bytes=ROOM_FOR_TWO)
    store = tiers_of(setup).store
    with resolve(source("a"), setup) as files:
        for name in ("b", "c"):
            resolve(source(name), setup).release()
        assert held(store) == named("a", "c")
        with resolve(source("c"), setup):
            fetched = len(hub.fetched)
            with pytest.raises(ModelLoadError) as caught:
                resolve(source("b"), setup)
            assert len(hub.fetched) == fetched
        assert files.path.exists()
    assert (caught.value.details["error_class"], caught.value.details["permanent"]) == ("STORAGE", False)
    assert "FARMHAND_WEIGHTS_MAX_BYTES" in caught.value.details["remedy"]


def test_above_the_fill_threshold_what_is_not_in_use_leaves(tmp_path: Path) -> None:
    roomy, tight = setup_in(tmp_path), setup_in(tmp_path, fill=1e-9)
    store = tiers_of(tight).store
    resolve(source("a"), roomy).release()
    with resolve(source("b"), roomy):
        resolve(source("c"), tight).release()
        assert held(store) == named("b", "c")


def test_pruning_beside_a_process_that_uses_the_files_keeps_them(hub: HubStandIn, tmp_path: Path) -> None:
    setup = setup_in(tmp_path)
    store = tiers_of(setup).store
    user = begin(PINNED, setup, hub)
    path = Path(user.answer()["path"])
    assert [entry.in_use for entry in store.entries()] == [True]
    assert not store.remove(PLACE)
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    user.kill()
    assert store.remove(PLACE)
    assert not path.exists()


def test_a_model_keeps_its_files_as_long_as_it_exists(tmp_path: Path) -> None:
    class Model:
        """What maps the files."""

    setup, model = setup_in(tmp_path), Model()
    with resolve(PINNED, setup) as files:
        files.keep_for(model)
    store = tiers_of(setup).store
    assert not store.remove(PLACE)
    del model
    gc.collect()
    assert store.remove(PLACE)


@pytest.mark.parametrize("spoil", ["cut", "delete", "manifest"])
def test_what_was_damaged_on_disk_is_fetched_again(tmp_path: Path, spoil: str) -> None:
    setup = setup_in(tmp_path)
    with resolve(PINNED, setup) as files:
        weights = files.path / "model.safetensors"
    if spoil == "cut":
        os.truncate(weights, 1000)
    elif spoil == "delete":
        weights.unlink()
    else:
        (weights.parent.parent / "manifest.json").write_text("{")
    with resolve(PINNED, setup) as files:
        assert (files.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_fetch_of_another_plan_starts_over(hub: HubStandIn, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = [0] * 100
    with pytest.raises(ModelLoadError):
        resolve(PINNED, setup_in(tmp_path, timeout_s=1.0))
    hub.cuts.clear()
    changed = WEIGHTS[::-1]
    hub.repositories[REPOSITORY] = {**FILES, "model.safetensors": changed}
    with resolve(PINNED, setup_in(tmp_path)) as files:
        assert (files.path / "model.safetensors").read_bytes() == changed


def test_pruning_everything_takes_what_dead_fetches_have_left_but_no_fetch_under_way(
    hub: HubStandIn, tmp_path: Path
) -> None:
    hub.stalls["model.safetensors"] = 1000
    fetching = begin(PINNED, setup_in(tmp_path), hub)
    wait_until(lambda: hub.sent, 20, "the fetch to begin")
    store = tiers_of(setup_in(tmp_path)).store
    assert prune(Prune(all=True), store)
    assert contents(store_of(tmp_path) / "partial")
    fetching.kill()
    assert prune(Prune(all=True), store)
    assert contents(store_of(tmp_path) / "partial") == {}


def test_what_a_dead_fetch_has_left_gives_way_to_others(hub: HubStandIn, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = [0] * 100
    with pytest.raises(ModelLoadError):
        resolve(source("a"), setup_in(tmp_path, timeout_s=1.0))
    hub.cuts.clear()
    assert contents(store_of(tmp_path) / "partial")
    resolve(source("b"), setup_in(tmp_path, max_bytes=400_000)).release()
    assert contents(store_of(tmp_path) / "partial") == {}
