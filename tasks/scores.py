"""Scores as clients read them: best first, each with its rank and the id of its item.

A host ranks the items that it was given. A request that was cut into slices has one ranking a slice, merged here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec


class Score(msgspec.Struct, frozen=True):
    """One entry of a ranking; ``rank`` counts from 0."""

    item_id: str
    score: float
    rank: int


def name_of(own: Any, place: int) -> str:
    """What an item is called in the answer: by its own id, else ``item-<place>``; places count from 0."""
    return f"item-{place}" if own is None else str(own)


def named(items: Sequence[Any]) -> list[Any]:
    """Items that keep their names when they are cut apart; what is no item stays, for the host to refuse."""
    return [_named(item, place) for place, item in enumerate(items)]


def ranking(items: Sequence[Any], scores: Sequence[float]) -> bytes:
    """The msgpack list of one request's scores, highest first; equal ones in the order of their items."""
    names = [_named(item, place)["id"] for place, item in enumerate(items)]
    ordered = sorted(zip(names, scores, strict=True), key=lambda one: -one[1])
    return _encoder.encode([Score(name, score, rank) for rank, (name, score) in enumerate(ordered)])


def merged(rankings: Sequence[bytes]) -> bytes:
    """The one ranking of a request's slices, given in order."""
    every = [score for one in rankings for score in _decoder.decode(one)]
    ordered = sorted(every, key=lambda one: -one.score)
    return _encoder.encode([Score(one.item_id, one.score, rank) for rank, one in enumerate(ordered)])


def _named(item: Any, place: int) -> Any:
    if isinstance(item, Mapping):
        return {**item, "id": name_of(item.get("id"), place)}
    return {"text": item, "id": name_of(None, place)} if isinstance(item, str) else item


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Score])
