"""A snapshot without a database: finding models by name and by digest."""

from uuid import uuid4

import pytest

from common.errors import ModelNotFoundError
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec, Source


def snapshot(*names: str) -> Snapshot:
    return Snapshot(1, uuid4(), {name: ModelSpec(id=name, family="f", source=Source()) for name in names})


def nearest(held: Snapshot, wanted: str) -> list[str]:
    with pytest.raises(ModelNotFoundError) as caught:
        held.model(wanted)
    found: list[str] = caught.value.details["nearest"]
    assert all(name in caught.value.message for name in found)
    return found


def test_a_model_is_found_by_name_and_by_digest() -> None:
    held = snapshot("a", "b")
    assert held.model("a").id == "a"
    assert held.by_digest(held.model("b").digest) is held.model("b")
    assert held.by_digest("0" * 16) is None


@pytest.mark.parametrize("wanted", ["INTFLOAT/E5-SMALL-V2", "e5-small-v2", "intfloat/e5-smal-v2", "E5_small_v2"])
def test_a_name_almost_right_finds_the_model(wanted: str) -> None:
    held = snapshot("BAAI/bge-m3", "intfloat/e5-small-v2", "intfloat/e5-large-v2")
    assert nearest(held, wanted)[0] == "intfloat/e5-small-v2"


def test_a_model_under_another_owner_is_suggested() -> None:
    assert nearest(snapshot("BAAI/bge-m3", "other/x"), "someone/bge-m3") == ["BAAI/bge-m3"]


def test_nothing_like_it_suggests_nothing() -> None:
    assert nearest(snapshot("BAAI/bge-m3"), "zzzzzzzzzz") == []


def test_a_very_long_name_is_not_repeated_whole() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        snapshot("a").model("x" * 100_000)
    assert len(caught.value.message) < 400
