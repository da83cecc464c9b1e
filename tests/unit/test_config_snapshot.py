"""A snapshot without a database: finding models by name and by digest."""

import time
from statistics import median
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


def test_a_profile_like_none_names_the_model_and_its_profiles() -> None:
    held = holding(SHORT, spec("org/n"))
    assert nearest(held, "m:zzz") == ["org/m"]
    with pytest.raises(ModelNotFoundError, match=r"The profiles of org/m are default, short, shorter$"):
        held.model("m:zzz")
    assert nearest(held, "org/n:zzz") == ["org/n"]


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


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (
            [f"organisation-{n % 37}/some-embedding-model-{n}-v1.5" for n in range(1000)],
            "organisation-3/som-model-9-v9",
        ),
        ([f"{'a' * 20}/{n:05d}{'b' * 170}" for n in range(1000)], f"{'a' * 20}/12{'b' * 150}x"),
        ([f"{'a' * 20}/{n:05d}{'b' * 170}" for n in range(1000)], "b" * 100_000),
    ],
)
def test_a_name_asked_in_vain_holds_up_nobody(ids: list[str], wanted: str) -> None:
    """A thousand models of five profiles each; each time another name."""
    held = holding(*(spec(one, **{f"p{n}": Profile(max_length=n + 1) for n in range(5)}) for one in ids))
    held.prepare()
    took = []
    for n in range(20):
        started = time.process_time()
        with pytest.raises(ModelNotFoundError):
            held.model(f"{n}{wanted}")
        took.append(time.process_time() - started)
    assert median(took) < 0.002


def test_a_very_long_name_is_not_repeated_whole() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        snapshot("a").model("x" * 100_000)
    assert len(caught.value.message) < 400
