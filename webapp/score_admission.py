"""Whether its model can serve a score request: the query, the items to rank, the instruction and options."""

from typing import Final

from common.errors import InputTooLongError, RequestError
from common.settings import WebSettings
from config_db.spec import ModelSpec
from tasks.messages import Request
from tasks.scores import name_of
from webapp.admission import Admitted, TextItem, choose_profile, read_items, read_options, wrong_with
from webapp.wire.bodies import Item, ScoreBody

MAX_ITEMS: Final = 1000
MAX_QUERY_ID: Final = 1000
"""Characters; the id travels in the message's headers, beside its body."""
MAX_QUERY_CHARACTERS: Final = 64 * 2**20
"""Over all items: each is read together with the query, so a long query costs as often as there are items."""
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
    if len(query.text) * len(items) > MAX_QUERY_CHARACTERS:
        raise InputTooLongError(
            f"a query of {len(query.text)} characters is too long to be read with each of {len(items)} items",
            param="query.text",
        )
    for place, item in enumerate(items):
        item.id = name_of(item.id, place)
    request = Request(items=items, query=query, instruction=body.instruction, options=options)
    return Admitted(spec, request, _estimate_tokens(spec, query, items))


def _query(spec: ModelSpec, query: Item, max_text_bytes: int) -> TextItem:
    wrong = wrong_with(spec, query, max_text_bytes)
    if wrong is not None:
        what, field = wrong
        raise RequestError(f"the query: {what}", param=f"query.{field}")
    if query.id is not None and len(query.id) > MAX_QUERY_ID:
        raise RequestError(f"the query's id is longer than {MAX_QUERY_ID} characters", param="query.id")
    return TextItem(query.text or "", query.id)


def _estimate_tokens(spec: ModelSpec, query: TextItem, items: list[TextItem]) -> int:
    """A guess at the tokens of all pairs, each cut to the model's length, good enough to fill batches by."""
    pairs = ((len(query.text) + len(item.text)) // 4 + _PAIR_TOKENS for item in items)
    return sum(pairs) if spec.max_length is None else sum(min(spec.max_length, pair) for pair in pairs)
