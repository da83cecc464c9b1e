"""One micro-batch against a model: every part gets exactly one answer, and only the culprit fails."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.errors import FarmError, RequestError
from tasks.messages import Request
from tests.fakes.family import AcceleratorError
from workers.host.batches import BatchRun
from workers.host.stages import Stage


@dataclass
class _Prepared:
    requests: Sequence[Request]
    request_tokens: Sequence[int]


@dataclass
class ScriptedModel:
    """Answers with the text; ``harm`` raises for texts it knows, in the step it is given for."""

    harm: dict[str, Callable[[list[str]], None]] = field(default_factory=dict)
    runs: list[int] = field(default_factory=list)
    bytes: int = 1

    def prepare(self, operation: str, requests: Sequence[Request]) -> _Prepared:
        assert operation == "encode"
        self._act("prepare", requests)
        return _Prepared(requests, [1] * len(requests))

    def run(self, prepared: _Prepared) -> _Prepared:
        self.runs.append(len(prepared.requests))
        self._act("run", prepared.requests)
        return prepared

    def finish(self, prepared: _Prepared, raw: Any) -> list[Any]:
        self._act("finish", prepared.requests)
        texts = [request.items[0]["text"] for request in raw.requests]
        return [RequestError("own error") if text == "own" else text.encode() for text in texts if text != "swallowed"]

    def close(self) -> None:
        raise AssertionError("nobody closes a model in use")

    def _act(self, step: str, requests: Sequence[Request]) -> None:
        if step in self.harm:
            self.harm[step]([request.items[0]["text"] for request in requests])


def _noted(_: Stage) -> AbstractContextManager[None]:
    return nullcontext()


def _run(model: ScriptedModel, *texts: str, ahead: bool = True, rooms: list[int] | None = None) -> list[Any]:
    requests = [Request(items=[{"text": text}]) for text in texts]
    made: list[int] = [] if rooms is None else rooms
    run = BatchRun(model, "encode", requests, _noted, lambda: made.append(1))
    if ahead:
        run.prepare()
    return [answer.result if answer.error is None else answer.error["code"] for answer in run.answers()]


def _raise_at(text: str, error: Exception) -> Callable[[list[str]], None]:
    def harm(texts: list[str]) -> None:
        if text in texts:
            raise error

    return harm


@pytest.mark.parametrize("step", ["prepare", "run", "finish"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_only_the_culprit_fails_whichever_step_raises(step: str, size: int) -> None:
    texts = [f"t{number}" for number in range(size)]
    for culprit in range(size):
        model = ScriptedModel({step: _raise_at(f"t{culprit}", ValueError("bad row"))})
        answers = _run(model, *texts)
        assert answers == ["INFERENCE_ERROR" if n == culprit else f"t{n}".encode() for n in range(size)]


def test_a_clean_batch_is_run_once() -> None:
    model = ScriptedModel()
    assert _run(model, "a", "b", "c") == [b"a", b"b", b"c"]
    assert model.runs == [3]


def test_the_culprit_of_256_is_found_in_few_passes() -> None:
    model = ScriptedModel({"run": _raise_at("t100", ValueError())})
    answers = _run(model, *(f"t{number}" for number in range(256)))
    assert answers.count("INFERENCE_ERROR") == 1
    assert len(model.runs) <= 1 + 2 * 8


def test_a_request_s_own_error_costs_nobody_a_second_pass() -> None:
    model = ScriptedModel()
    assert _run(model, "a", "own", "c") == [b"a", "INVALID_INPUT", b"c"]
    assert model.runs == [3]


def test_a_farm_error_keeps_its_code() -> None:
    model = ScriptedModel({"prepare": _raise_at("b", RequestError("no"))})
    assert _run(model, "a", "b") == [b"a", "INVALID_INPUT"]


def test_a_model_that_swallows_a_row_fails_that_request_only() -> None:
    assert _run(ScriptedModel(), "a", "swallowed", "c") == [b"a", "INFERENCE_ERROR", b"c"]


def test_out_of_memory_makes_room_once_then_halves() -> None:
    rooms: list[int] = []

    def too_much(texts: list[str]) -> None:
        if len(texts) > 2 or "huge" in texts:
            raise MemoryError

    answers = _run(ScriptedModel({"run": too_much}), "a", "b", "c", "huge", rooms=rooms)
    assert answers == [b"a", b"b", b"c", "RESOURCE_EXHAUSTED"]
    assert rooms == [1]


def test_a_lost_device_is_nobody_s_fault_and_is_raised() -> None:
    model = ScriptedModel({"run": _raise_at("a", AcceleratorError("CUDA error: unspecified launch failure"))})
    with pytest.raises(AcceleratorError):
        _run(model, "a", "b")
    with pytest.raises(RuntimeError, match="CUDA error"):
        _run(ScriptedModel({"run": _raise_at("a", RuntimeError("CUDA error: device-side assert"))}), "a")


def test_prepared_ahead_or_not_makes_no_difference() -> None:
    assert _run(ScriptedModel(), "a", "own", ahead=False) == _run(ScriptedModel(), "a", "own", ahead=True)


def test_times_add_up_over_halves() -> None:
    model = ScriptedModel({"run": _raise_at("a", ValueError())})
    run = BatchRun(model, "encode", [Request(items=[{"text": text}]) for text in "ab"], _noted, lambda: None)
    answers = run.answers()
    assert [isinstance(answer.error, dict) for answer in answers] == [True, False]
    assert run.times.inference_ms > 0
    assert issubclass(RequestError, FarmError)
