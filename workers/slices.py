"""Cuts a request that is larger than a micro-batch into slices that are not. Pure: bytes in, bytes out."""

from dataclasses import dataclass
from typing import Any

import msgspec

from common.errors import MessageError
from tasks import messages, names
from tasks.messages import Ticket


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
    if ticket.items <= 1 or fits or ticket.operation != names.Operation.ENCODE:
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


def _cut(model: str, request: _RawRequest, items: list[msgspec.Raw], tokens: int) -> Cut:
    part = msgspec.structs.replace(request, items=items)
    return Cut(messages.encode_body(model, part), len(items), tokens)
