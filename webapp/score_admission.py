"""Whether its model can serve a score request: the query, the items to rank, the instruction and options."""

from typing import Final

from common.errors import RequestError
from common.settings import WebSettings
from config_db.spec import ModelSpec
from tasks.messages import Request
from tasks.scores import name_of
from webapp.admission import Admitted, TextItem, choose_profile, read_items, read_options, wrong_with
from webapp.wire.bodies import Item, ScoreBody

MAX_ITEMS: Final = 1000
MAX_QUERY_ID: Final = 1000
"""Characters; the id travels in the message's headers, beside its body."""
_PAIR_TOKENS: Final = 4
"""What stands round the two texts of a pair."""


def admit_score(spec: ModelSpec, body: ScoreBody, settings: WebSettings) -> Admitted:
    """The request with the spec of the profile that it names.

    Raises:
        RequestError: the first thing that is wrong; if that is an item, ``details["items"]`` lists all that are.
    """
    if body.params:
        raise RequestError("instruction and options of a score request stand beside its items", param="params")
    options = read_options(body.options, param="options")
    if not isinstance(options.get("instruction"), str | None):
        raise RequestError("an instruction is a text", param="options.instruction")
    spec = choose_profile(spec, options, param="options")
    query = _query(spec, body.query, settings.max_item_text_bytes)
    most, most_bytes = min(settings.max_items, MAX_ITEMS), settings.max_item_text_bytes
    items = read_items(spec, body.items, max_items=most, max_text_bytes=most_bytes)
    for place, item in enumerate(items):
        item.id = name_of(item.id, place)
    request = Request(items=items, query=query, instruction=body.instruction, options=options)
    return Admitted(spec, request, _estimate_tokens(query, items))


def _query(spec: ModelSpec, query: Item, max_text_bytes: int) -> TextItem:
    wrong = wrong_with(spec, query, max_text_bytes)
    if wrong is not None:
        what, field = wrong
        raise RequestError(f"the query: {what}", param=f"query.{field}")
    if query.id is not None and len(query.id) > MAX_QUERY_ID:
        raise RequestError(f"the query's id is longer than {MAX_QUERY_ID} characters", param="query.id")
    return TextItem(query.text or "", query.id)


def _estimate_tokens(query: TextItem, items: list[TextItem]) -> int:
    """A guess at the tokens of all pairs, good enough to fill batches by."""
    characters = sum(len(item.text) for item in items) + len(items) * len(query.text)
    return characters // 4 + _PAIR_TOKENS * len(items)
