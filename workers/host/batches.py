"""Runs one micro-batch against a loaded model: every part gets exactly one answer.

A micro-batch that raises is halved until the culprit stands alone. Knows nothing of threads, frames or residency.
"""

import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeAlias

from common.errors import FarmError, InferenceError, ResidencyFullError
from common.logs import get_logger
from tasks.messages import Request
from workers.host import devices
from workers.host.families.protocol import Model, Prepared
from workers.host.frames import Answer
from workers.host.stages import Stage

log = get_logger("host")

Note: TypeAlias = Callable[[Stage], AbstractContextManager[None]]
"""Shows a stage on the board for the length of a block."""


@dataclass(slots=True)
class Times:
    """Milliseconds spent on one micro-batch, by step; halves add up."""

    tokenization_ms: float = 0.0
    inference_ms: float = 0.0
    postprocessing_ms: float = 0.0


@dataclass(slots=True)
class BatchRun:
    """One micro-batch on its way through a model.

    Args:
        note: shows the stage that is entered.
        make_room: evicts what is idle, after the device ran out of memory.
    """

    model: Model
    operation: str
    requests: Sequence[Request]
    note: Note
    make_room: Callable[[], None]
    times: Times = field(default_factory=Times)
    prepared: Prepared | None = None
    _steps_taken: int = 0

    def prepare(self) -> None:
        """Tokenise all together, ahead of the turn. A raise is kept for ``answers``, which finds the culprit."""
        try:
            self.prepared = self._prepare(self.requests)
        except Exception as error:  # noqa: BLE001 - raised again, and answered, by ``answers``
            log.debug("prepare_refused", error=str(error))

    def answers(self) -> list[Answer]:
        """One answer per request, in order.

        Raises:
            Exception: the device is lost (``devices.is_device_lost``): no request's fault.
        """
        return self._answer(self.requests, self.prepared)

    def _answer(self, requests: Sequence[Request], prepared: Prepared | None) -> list[Answer]:
        try:
            return self._run(requests, prepared)
        except Exception as error:
            if devices.is_device_lost(error):
                raise
            if devices.is_out_of_memory(error) and self._free_memory():
                return self._answer(requests, None)
            if len(requests) == 1:
                return [Answer(None, 0, as_farm_error(error).as_dict())]
        middle = (len(requests) + 1) // 2
        return self._answer(requests[:middle], None) + self._answer(requests[middle:], None)

    def _free_memory(self) -> bool:
        """Take the next step against a want of memory: clear caches, then evict; false if only halving is left."""
        self._steps_taken += 1
        if self._steps_taken == 1:
            devices.clear_caches()
        elif self._steps_taken == 2:
            self.make_room()
        else:
            return False
        return True

    def _run(self, requests: Sequence[Request], prepared: Prepared | None) -> list[Answer]:
        if prepared is None:
            prepared = self._prepare(requests)
        started = monotonic()
        with self.note(Stage.COMPUTE):
            raw = self.model.run(prepared)
            ran = monotonic()
            values = self.model.finish(prepared, raw)
        self.times.inference_ms += (ran - started) * 1000
        self.times.postprocessing_ms += (monotonic() - ran) * 1000
        tokens = prepared.request_tokens
        if len(values) != len(requests) or len(tokens) != len(requests):
            raise InferenceError(f"the model gave {len(values)} answers to {len(requests)} requests")
        return [_answer(value, count) for value, count in zip(values, tokens, strict=True)]

    def _prepare(self, requests: Sequence[Request]) -> Prepared:
        started = monotonic()
        with self.note(Stage.PREPARE):
            prepared = self.model.prepare(self.operation, requests)
        self.times.tokenization_ms += (monotonic() - started) * 1000
        return prepared


def as_farm_error(error: Exception) -> FarmError:
    """What a caller learns of an exception that a model raised on its request alone."""
    if isinstance(error, FarmError):
        return error
    if devices.is_out_of_memory(error):
        return ResidencyFullError("the device has not the memory for this request, even alone; send less at once")
    raised_at = traceback.extract_tb(error.__traceback__)[-1]
    log.warning("request_failed", error=repr(error)[:500], at=f"{raised_at.filename}:{raised_at.lineno}")
    return InferenceError(f"the model failed on this request: {type(error).__name__}: {str(error)[:300]}")


def _answer(value: Any, tokens: int) -> Answer:
    if isinstance(value, FarmError):
        return Answer(None, 0, value.as_dict())
    return Answer(value, tokens)
