"""A spec against its family: what it leaves open is the family's, what it says of itself the family can do."""

from typing import Any

import pytest

from common.errors import ConfigError
from config_db.documents import read_model
from config_db.spec import plain

GOOD: dict[str, Any] = {"id": "org/m", "family": "dense", "source": {"hub": "org/m"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"operations": ["encode", "score"]}, "operations"),
        ({"outputs": ["sparse"]}, "outputs"),
        ({"inputs": ["text", "image"]}, "inputs"),
        ({"dims": {"dens": 8}}, "dims"),
        ({"profiles": {"v1.5": {"outputs": ["score"]}}}, "profiles['v1.5'].outputs"),
        ({"family": "cross-encoder", "operations": ["encode"]}, "operations"),
    ],
)
def test_what_the_family_does_not_do_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError, match="the family `") as refused:
        read_model({**GOOD, **fields})
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"operations": ["encode", "encode"]}, "operations"),
        ({"outputs": []}, "outputs"),
        ({"inputs": ["text", "text"]}, "inputs"),
        ({"profiles": {"v1.5": {"outputs": []}}}, "profiles['v1.5'].outputs"),
    ],
)
def test_a_list_names_at_least_one_and_none_twice(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError, match="none twice") as refused:
        read_model({**GOOD, **fields})
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("family", "operations", "outputs", "inputs"),
    [
        ("cross-encoder", ("score",), ("score",), ("text",)),
        ("gliner", ("extract",), ("json",), ("text",)),
        ("sparse", ("encode",), ("sparse",), ("text",)),
        ("bge-m3", ("encode",), ("dense",), ("text",)),
        ("clip", ("encode",), ("dense",), ("text",)),
    ],
)
def test_what_is_left_open_is_the_familys(
    family: str, operations: tuple[str, ...], outputs: tuple[str, ...], inputs: tuple[str, ...]
) -> None:
    spec = read_model({**GOOD, "family": family})
    assert (spec.operations, spec.outputs, spec.inputs) == (operations, outputs, inputs)
    assert read_model(plain(spec)) == spec


def test_what_is_not_served_may_be_of_a_kind_that_nothing_here_runs() -> None:
    known = {**GOOD, "family": "speech", "operations": ["generate"], "outputs": ["tokens"]}
    assert read_model({**known, "unsupported": "no family hears"}).family == "speech"
    with pytest.raises(ConfigError, match="there is no 'speech'"):
        read_model(known)
