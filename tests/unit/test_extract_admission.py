"""What the door takes for an extract request, and what it refuses."""

from typing import Any

import msgspec
import pytest

from common.errors import RequestError
from common.settings import WebSettings, load_settings
from config_db.spec import ModelSpec, Profile, Source
from webapp.admission import Admitted
from webapp.extract_admission import MAX_LABELS, MAX_SCHEMA_DEPTH, MAX_SCHEMA_VALUES, admit_extract
from webapp.wire.bodies import ExtractBody

SPEC = ModelSpec(
    id="org/finder",
    family="gliner",
    source=Source(path="/"),
    operations=("extract",),
    outputs=("json",),
    profiles={"sure": Profile(options={"threshold": 0.9})},
)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> WebSettings:
    monkeypatch.setenv("FARMHAND_MAX_ITEMS", "100")
    return load_settings(WebSettings)


def admit(settings: WebSettings, *items: dict[str, Any], spec: ModelSpec = SPEC, **params: Any) -> Admitted:
    content = {"items": items or ({"text": "Ada"},), "params": params}
    return admit_extract(spec, msgspec.json.decode(msgspec.json.encode(content), type=ExtractBody), settings)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"a": 1}
    for _ in range(depth - 1):
        schema = {"a": schema}
    return schema


def test_items_are_named_and_labels_stand_once(settings: WebSettings) -> None:
    admitted = admit(settings, {"text": "a"}, {"text": "b", "id": "own"}, labels=["x", "y", "x"], instruction="do")
    request = admitted.request
    assert [item.id for item in request.items] == ["item-0", "own"]
    assert (request.labels, request.instruction) == (["x", "y"], "do")


def test_a_profile_is_chosen_by_option(settings: WebSettings) -> None:
    assert admit(settings, options={"profile": "sure"}).spec.id == "org/finder:sure"


def test_more_labels_weigh_more(settings: WebSettings) -> None:
    """Every text goes with all of them, so a micro-batch holds fewer."""
    few, many = (admit(settings, labels=[f"label {n}" for n in range(count)]) for count in (1, 100))
    assert many.tokens > 20 * few.tokens


def test_a_family_that_reads_a_text_once_a_label_weighs_it_so_often(settings: WebSettings) -> None:
    labels, text = [f"label {n}" for n in range(10)], {"text": "word " * 1000}
    once, each = (
        admit(settings, text, spec=msgspec.structs.replace(SPEC, family=family), labels=labels).tokens
        for family in ("gliclass", "nli")
    )
    assert each > 9 * once


def test_bounds_are_taken_and_one_more_is_refused(settings: WebSettings) -> None:
    admit(settings, labels=[str(n) for n in range(MAX_LABELS)])
    admit(settings, output_schema=nested(MAX_SCHEMA_DEPTH))
    admit(settings, output_schema={"a": [0] * (MAX_SCHEMA_VALUES - 2)})


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"labels": []}, "params.labels"),
        ({"labels": [str(n) for n in range(MAX_LABELS + 1)]}, "params.labels"),
        ({"labels": ["a", "\t"]}, "params.labels[1]"),
        ({"labels": ["a" * 1001]}, "params.labels[0]"),
        ({"output_schema": {}}, "params.output_schema"),
        ({"output_schema": nested(MAX_SCHEMA_DEPTH + 1)}, "params.output_schema.a"),
        ({"output_schema": {"a": [0] * (MAX_SCHEMA_VALUES - 1)}}, "params.output_schema"),
        ({"options": {"profile": "none"}}, "params.options.profile"),
    ],
)
def test_what_no_model_takes_is_refused(settings: WebSettings, params: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        admit(settings, **params)
    assert str(refused.value.param).startswith(param)
