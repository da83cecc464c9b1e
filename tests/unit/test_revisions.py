"""Which spec of a model serves while a new one is on its way."""

import msgspec

from config_db.snapshot import EMPTY, Snapshot
from config_db.spec import ModelSpec
from tests.fakes.family import fake_spec
from workers.revisions import ROOM_TRIES, TRY_AGAIN_S, Revisions


def _spec(revision: int, name: str = "m/a") -> ModelSpec:
    return fake_spec(name, path="/", revision=revision)


def _snapshot(*specs: ModelSpec) -> Snapshot:
    return msgspec.structs.replace(EMPTY, models={spec.id: spec for spec in specs})


OLD, NEW, NEWER = (_spec(number) for number in (1, 2, 3))


def _serving_old() -> Revisions:
    revisions = Revisions()
    revisions.on_loaded(OLD)
    revisions.read(_snapshot(NEW))
    return revisions


def test_a_model_that_was_never_resident_is_served_as_it_is() -> None:
    revisions = Revisions()
    revisions.read(_snapshot(NEW))
    assert revisions.serving(OLD) is OLD
    assert revisions.serving(NEW) is NEW
    assert revisions.due(0.0, ()) == []


def test_traffic_moves_when_the_new_spec_is_resident() -> None:
    revisions = _serving_old()
    assert revisions.serving(NEW) is OLD
    assert revisions.due(10.0, {OLD.digest}) == [NEW]
    revisions.on_loaded(NEW)
    assert revisions.serving(NEW) is NEW
    assert revisions.serving(OLD) is NEW  # admitted before the change, arrived after it
    assert revisions.leaving() == {OLD.digest: "replaced"}
    revisions.gone(OLD.digest)
    assert revisions.leaving() == {}


def test_a_spec_that_does_not_load_is_tried_now_and_then_while_the_former_serves() -> None:
    revisions = _serving_old()
    assert revisions.due(10.0, {OLD.digest}) == [NEW]
    assert revisions.due(10.0 + TRY_AGAIN_S / 2, {OLD.digest}) == []
    assert revisions.due(10.0 + TRY_AGAIN_S, {OLD.digest}) == [NEW]
    assert revisions.serving(NEW) is OLD
    assert revisions.spec(OLD.digest) is OLD


def test_what_nobody_holds_or_asks_for_is_not_loaded() -> None:
    revisions = _serving_old()
    assert revisions.due(10.0, ()) == []
    revisions.serving(NEW)
    assert revisions.due(10.0, ()) == [NEW]


def test_a_newer_spec_takes_the_place_of_one_that_did_not_load() -> None:
    revisions = _serving_old()
    revisions.due(10.0, {OLD.digest})
    revisions.read(_snapshot(NEWER))
    assert revisions.due(10.0, {OLD.digest}) == [NEWER]
    revisions.on_loaded(NEW)  # it came after all: too late
    assert revisions.serving(NEWER) is OLD


def test_a_change_taken_back_leaves_everything_as_it_was() -> None:
    revisions = _serving_old()
    revisions.read(_snapshot(OLD))
    assert revisions.due(10.0, {OLD.digest}) == []
    assert revisions.serving(OLD) is OLD


def test_where_there_is_no_room_for_both_the_former_goes_first() -> None:
    revisions = _serving_old()
    for _ in range(ROOM_TRIES):
        assert revisions.serving(NEW) is OLD
        revisions.on_no_room(NEW.digest)
    assert revisions.serving(NEW) is NEW
    assert revisions.leaving() == {OLD.digest: "replaced"}


def test_a_model_that_is_taken_from_the_config_leaves() -> None:
    revisions = _serving_old()
    revisions.read(_snapshot())
    assert revisions.leaving() == {OLD.digest: "removed"}
