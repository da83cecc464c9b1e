"""Rankings: best first, ids and ranks of their own, however a request was cut."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import messages, scores
from tasks.messages import Outcome, Request, Ticket
from tasks.names import Operation
from workers.slices import cut_body

values = st.floats(allow_nan=False, allow_infinity=False, width=32)


def read(ranking: bytes) -> Any:
    return msgspec.msgpack.decode(ranking)


def test_the_best_comes_first_and_equal_ones_as_they_came() -> None:
    items = [{"text": "a", "id": "x"}, {"text": "b"}, "c", {"text": "d", "id": ""}]
    assert read(scores.ranking(items, [0.5, 2.0, -1.0, 0.5])) == [
        {"item_id": "item-1", "score": 2.0, "rank": 0},
        {"item_id": "x", "score": 0.5, "rank": 1},
        {"item_id": "", "score": 0.5, "rank": 2},
        {"item_id": "item-2", "score": -1.0, "rank": 3},
    ]


def test_a_ranking_has_a_score_for_each_item() -> None:
    with pytest.raises(ValueError, match="argument"):
        scores.ranking([{"text": "a"}, {"text": "b"}], [1.0])


@given(st.lists(values, min_size=1, max_size=30), st.integers(1, 30))
def test_a_request_that_was_cut_is_ranked_as_a_whole_one(found: list[float], size: int) -> None:
    items = scores.named([f"text {n}" for n in range(len(found))])
    cut = [scores.ranking(items[at : at + size], found[at : at + size]) for at in range(0, len(found), size)]
    assert read(messages.join_results(cut, Operation.SCORE)) == read(scores.ranking(items, found))


def test_slices_keep_query_instruction_and_names() -> None:
    request = Request(items=scores.named(["a"] * 7), query={"text": "q", "id": "Q"}, instruction="rank")
    ticket = Ticket(
        model="m", spec="s", operation=Operation.SCORE, key="k", items=7, tokens=7, deadline=0.0, published=0.0
    )
    cuts = cut_body(ticket, messages.encode_body("m", request), max_items=3, max_tokens=100)
    parts = [messages.decode_body(cut.body)[1] for cut in cuts]
    assert [len(part.items) for part in parts] == [3, 3, 1]
    assert {(part.query["text"], part.instruction) for part in parts} == {("q", "rank")}
    assert [item["id"] for part in parts for item in part.items] == [f"item-{n}" for n in range(7)]


def test_an_outcome_keeps_the_querys_id_in_celerys_backend() -> None:
    ranked = msgspec.Raw(scores.ranking(["a"], [1.0]))
    outcome = Outcome(task_id="t", model="m", spec="s", result=ranked, usage={"pairs": 1}, query_id="Q")
    meta = messages.encode_celery_meta(outcome, Operation.SCORE, done_at="2026-01-01T00:00:00+00:00")
    result = msgspec.msgpack.decode(meta)["result"]
    assert result["query_id"] == "Q"
    assert result["scores"] == [{"item_id": "item-0", "score": 1.0, "rank": 0}]
    assert messages.decode_celery_meta(meta) == outcome
    assert messages.decode_outcome(messages.encode_outcome(outcome)) == outcome


def test_a_ticket_of_the_release_before_is_still_read() -> None:
    ticket = Ticket(
        model="m", spec="s", operation=Operation.ENCODE, key="k", items=1, tokens=1, deadline=0.0, published=0.0
    )
    fields = json.loads(msgspec.json.encode(ticket))
    del fields["query_id"]
    assert messages.read_ticket({messages.HEADER: json.dumps(fields)}) == ticket
