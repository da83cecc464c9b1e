"""Whether its model can serve an extract request: the items, what to extract, the options."""

from typing import Any, Final

from common.errors import RequestError
from common.settings import WebSettings
from config_db.families import FAMILIES
from config_db.spec import ModelSpec
from tasks.messages import Request
from tasks.scores import name_of
from webapp.admission import Admitted, TextItem, choose_profile, read_items, read_options
from webapp.wire.bodies import ExtractBody, ExtractParams, check_free_form

MAX_LABELS: Final = 1000
MAX_LABEL_CHARS: Final = 1000
MAX_SCHEMA_DEPTH: Final = 128
MAX_SCHEMA_VALUES: Final = 100_000
_NO_PARAMS: Final = ExtractParams()


def admit_extract(spec: ModelSpec, body: ExtractBody, settings: WebSettings) -> Admitted:
    """The request with the spec of the profile that it names.

    Raises:
        RequestError: the first thing that is wrong; if that is an item, ``details["items"]`` lists all that are.
    """
    params = body.params or _NO_PARAMS
    options = read_options(params.options, param="params.options")
    spec = choose_profile(spec, options, param="params.options")
    items = read_items(spec, body.items, max_items=settings.max_items, max_text_bytes=settings.max_item_text_bytes)
    for place, item in enumerate(items):
        item.id = name_of(item.id, place)
    request = Request(
        items=items,
        instruction=params.instruction,
        labels=_labels(params.labels),
        output_schema=_schema(params.output_schema),
        options=options,
    )
    return Admitted(spec, request, _estimate_tokens(spec, items, request.labels or []))


def _labels(labels: list[str] | None) -> list[str] | None:
    """The labels, each once; whether the model needs any is known to its family."""
    if labels is None:
        return None
    if not labels:
        raise RequestError("labels is empty: name at least one label, or leave it out", param="params.labels")
    if len(labels) > MAX_LABELS:
        message = f"{len(labels)} labels are more than the {MAX_LABELS} that one request may name"
        raise RequestError(message, param="params.labels")
    for place, label in enumerate(labels):
        if not label.strip():
            raise RequestError("a label is a text that is not blank", param=f"params.labels[{place}]")
        if len(label) > MAX_LABEL_CHARS:
            message = f"a label of {len(label)} characters is longer than the {MAX_LABEL_CHARS} that one may have"
            raise RequestError(message, param=f"params.labels[{place}]")
    return list(dict.fromkeys(labels))


def _schema(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema, if it is not too deep or too large to be read."""
    if schema is None:
        return None
    if not schema:
        raise RequestError("output_schema is empty: say what to extract, or leave it out", param="params.output_schema")
    check_free_form(schema, param="params.output_schema", max_depth=MAX_SCHEMA_DEPTH)
    if _count_values(schema) > MAX_SCHEMA_VALUES:
        message = f"output_schema holds more than the {MAX_SCHEMA_VALUES} values that one may have"
        raise RequestError(message, param="params.output_schema")
    return schema


def _count_values(value: object) -> int:
    """How many values there are in it, itself included."""
    if isinstance(value, dict):
        return 1 + sum(map(_count_values, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_count_values, value))
    return 1


def _estimate_tokens(spec: ModelSpec, items: list[TextItem], labels: list[str]) -> int:
    """A guess at the tokens, good enough to fill batches by: each text goes with all labels, or with each in turn."""
    family = FAMILIES.get(spec.family)
    times = len(labels) if family is not None and family.pairs_labels else 1
    around = sum(map(len, labels)) // 4 + 2 * len(labels) + 2
    return times * sum(len(item.text) for item in items) // 4 + around * len(items)
