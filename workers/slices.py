"""Cuts a request that is larger than a micro-batch into slices that are not. Pure: bytes in, bytes out."""

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from common.errors import MessageError
from tasks import messages
from tasks.messages import Ticket
from tasks.names import Operation

CUT: Final = frozenset({Operation.ENCODE, Operation.SCORE, Operation.EXTRACT})
"""Operations whose requests may be cut: their items are answered one by one."""
_ITEM: Final = re.compile(r"^items\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Cut:
    """One slice of a request: a body of its own, its items and estimated tokens."""

    body: bytes
    items: int
    tokens: int


class _RawRequest(messages.Request, kw_only=True):
    items: list[msgspec.Raw]


_raw_decoder = msgspec.msgpack.Decoder(tuple[tuple[str, _RawRequest], dict[str, Any], Any])


def cut_body(ticket: Ticket, body: bytes, *, max_items: int, max_tokens: int) -> list[Cut]:
    """Cut a request that is larger than a micro-batch into slices that are not; most are one slice, not decoded.

    Raises:
        MessageError: the body is not an inference request.
    """
    fits = ticket.items <= max_items and ticket.tokens <= max_tokens
    if ticket.items <= 1 or fits or ticket.operation not in CUT:
        return [Cut(body, ticket.items, ticket.tokens)]
    try:
        (model, request), _, _ = _raw_decoder.decode(body)
    except msgspec.DecodeError as error:
        raise MessageError(f"the message body is not an inference request: {error}") from error
    total = max(1, sum(len(memoryview(item)) for item in request.items))
    cuts: list[Cut] = []
    current: list[msgspec.Raw] = []
    tokens = 0
    for item in request.items:
        cost = max(1, ticket.tokens * len(memoryview(item)) // total)
        if current and (len(current) >= max_items or tokens + cost > max_tokens):
            cuts.append(_cut(model, request, current, tokens))
            current, tokens = [], 0
        current.append(item)
        tokens += cost
    cuts.append(_cut(model, request, current, tokens))
    return cuts


def error_in_request(error: dict[str, Any], *, first: int) -> dict[str, Any]:
    """The error of a slice as that of its request, whose item ``first`` the slice begins with: items named anew."""
    if not first:
        return error
    found = {**error}
    if isinstance(param := error.get("param"), str):
        found["param"] = _ITEM.sub(lambda match: f"items[{int(match[1]) + first}]", param)
    if isinstance(items := error.get("items"), list):
        found["items"] = [{**error_in_request(one, first=first), "index": one["index"] + first} for one in items]
    return found


def _cut(model: str, request: _RawRequest, items: list[msgspec.Raw], tokens: int) -> Cut:
    part = msgspec.structs.replace(request, items=items)
    return Cut(messages.encode_body(model, part), len(items), tokens)
