"""A snapshot without a database: finding models by name and by digest."""

import difflib
from uuid import uuid4

import pytest

from common.errors import ModelNotFoundError
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec, Profile, Source


def spec(name: str, *aliases: str, **profiles: Profile) -> ModelSpec:
    return ModelSpec(id=name, family="f", source=Source(path="/"), aliases=aliases, profiles=profiles)


def holding(*specs: ModelSpec) -> Snapshot:
    return Snapshot(1, uuid4(), {one.id: one for one in specs})


def snapshot(*names: str) -> Snapshot:
    return holding(*map(spec, names))


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


SHORT = spec("org/m", "m", "other/name", short=Profile(max_length=7), shorter=Profile(extends="short", max_length=5))


@pytest.mark.parametrize("wanted", ["org/m", "m", "other/name", "org/m:default", "m:default"])
def test_a_model_is_found_by_any_of_its_names(wanted: str) -> None:
    assert holding(SHORT, spec("org/n")).model(wanted) is SHORT


@pytest.mark.parametrize("wanted", ["org/m:short", "m:short", "other/name:short"])
def test_a_profile_is_a_model_of_its_own(wanted: str) -> None:
    held = holding(SHORT)
    found = held.model(wanted)
    assert (found.id, found.max_length) == ("org/m:short", 7)
    assert held.model(wanted) is found
    assert held.by_digest(found.digest) is found
    assert [one.id for one in held.all_specs()] == ["org/m", "org/m:short", "org/m:shorter"]


@pytest.mark.parametrize("wanted", ["org/m:", ":short", "org/m:long", "org/n:short", "org/m:short:short", "", ":"])
def test_what_names_no_profile_is_not_found(wanted: str) -> None:
    held = holding(SHORT, spec("org/n"))
    assert held.find(wanted) is None
    with pytest.raises(ModelNotFoundError):
        held.model(wanted)


def test_a_profile_almost_right_is_suggested() -> None:
    assert nearest(holding(SHORT), "org/m:shrt")[0] == "org/m:short"


def test_a_name_that_two_rows_claim_is_the_id_first_and_then_the_first_models() -> None:
    """Writers see to it that this does not happen; should it, all processes take the same one."""
    specs = [spec("b", "x"), spec("a", "x", "c"), spec("c")]
    for held in (holding(*specs), holding(*reversed(specs))):
        assert (held.model("x").id, held.model("c").id) == ("a", "c")


@pytest.mark.parametrize("wanted", ["INTFLOAT/E5-SMALL-V2", "e5-small-v2", "intfloat/e5-smal-v2", "E5_small_v2"])
def test_a_name_almost_right_finds_the_model(wanted: str) -> None:
    held = snapshot("BAAI/bge-m3", "intfloat/e5-small-v2", "intfloat/e5-large-v2")
    assert nearest(held, wanted)[0] == "intfloat/e5-small-v2"


def test_a_model_under_another_owner_is_suggested() -> None:
    assert nearest(snapshot("BAAI/bge-m3", "other/x"), "someone/bge-m3") == ["BAAI/bge-m3"]


def test_nothing_like_it_suggests_nothing() -> None:
    assert nearest(snapshot("BAAI/bge-m3"), "zzzzzzzzzz") == []


def test_a_name_asked_in_vain_again_costs_no_second_search(monkeypatch: pytest.MonkeyPatch) -> None:
    held = snapshot("BAAI/bge-m3")
    assert nearest(held, "bge-m4") == ["BAAI/bge-m3"]
    monkeypatch.setattr(difflib, "get_close_matches", None)
    assert nearest(held, "bge-m4") == ["BAAI/bge-m3"]
    assert nearest(held, "BGE-M4") == ["BAAI/bge-m3"]
    with pytest.raises(TypeError):
        held.model("bge-m5")


def test_a_very_long_name_is_not_repeated_whole() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        snapshot("a").model("x" * 100_000)
    assert len(caught.value.message) < 400
