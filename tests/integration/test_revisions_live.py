"""A new revision of a model under traffic: it takes over when it is there, and one that does not load takes nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from config_db.spec import ModelSpec
from tasks import codec
from tests.live import FAKE, LiveFarm, LiveWorker, fake_spec
from tests.services import wait_until

REFUSED = "was told not to load"


@pytest.fixture
def live(redis_url: str, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    farm = LiveFarm(redis_url, database_url, tmp_path)
    yield farm
    farm.close()


def _revision(number: int, **options: object) -> ModelSpec:
    return fake_spec(**{"revision": number, **options})  # type: ignore[arg-type]


def _answered_by(live: LiveFarm, text: str) -> str:
    """The digest of the spec that answered one request."""
    (outcome,) = live.wait_outcomes([live.send(text)])
    outcome.raise_error()
    assert codec.unpack(outcome.result)[0]["dense"]["values"] is not None
    return outcome.spec


def test_the_former_revision_serves_until_the_new_one_is_there_and_while_it_does_not_load(live: LiveFarm) -> None:
    first, broken, slow = _revision(1), _revision(2, load_fails="passing"), _revision(3, load_ms=700)
    live.add_models(first)
    worker = live.start_worker()
    assert _answered_by(live, "a") == first.digest

    live.add_models(broken)
    assert [_answered_by(live, f"b{n}") for n in range(3)] == [first.digest] * 3
    wait_until(lambda: REFUSED in worker.log.read_text(), 20, "an attempt to load the broken revision")
    assert _answered_by(live, "c") == first.digest

    live.add_models(slow)
    began = _answered_by(live, "d")
    assert began == first.digest  # 700 ms of loading hold nobody up
    wait_until(lambda: _answered_by(live, "e") == slow.digest, 20, "the new revision to serve")
    wait_until(lambda: _evicted(worker, first, "replaced"), 10, "the former revision to leave")
    live.assert_settled()


def test_the_repair_of_a_model_that_never_loaded_is_served_at_once(live: LiveFarm) -> None:
    live.add_models(_revision(1, load_fails="permanent"))
    live.start_worker()
    (outcome,) = live.wait_outcomes([live.send("a")])
    assert outcome.error is not None
    assert outcome.error["code"] == "MODEL_LOAD_FAILED"
    repaired = _revision(2)
    live.add_models(repaired)
    assert _answered_by(live, "b") == repaired.digest


def test_a_model_taken_from_the_config_leaves_the_hosts(live: LiveFarm) -> None:
    spec, other = _revision(1), fake_spec("fake/other")
    live.add_models(spec, other)
    worker = live.start_worker()
    assert _answered_by(live, "a") == spec.digest
    live.replace_models(other)
    wait_until(lambda: _evicted(worker, spec, "removed"), 10, "the removed model to leave")
    assert FAKE in live.specs


def _evicted(worker: LiveWorker, spec: ModelSpec, reason: str) -> bool:
    lines = worker.log.read_text().splitlines()
    return any("evicted" in line and spec.digest in line and reason in line for line in lines)
