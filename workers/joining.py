"""What comes back of the slices of a request, joined into its one outcome."""

from dataclasses import dataclass

from tasks import messages
from tasks.messages import Outcome
from tasks.names import Operation
from workers.hosts.protocol import BatchTiming, PartResult
from workers.intake import Held, Intake
from workers.settling import Settler
from workers.slices import error_in_request


@dataclass(slots=True)
class Slice:
    """One part of a held request, run in one micro-batch.

    ``place`` is its position among the request's parts, ``first`` that of its first item among the request's items.
    """

    held: Held
    place: int
    body: bytes
    first: int


class Joiner:
    """Takes results in any order and answers a request when its last is there, or its first error."""

    def __init__(self, intake: Intake, settler: Settler) -> None:
        self._intake = intake
        self._settler = settler

    def take(self, part: Slice, result: PartResult, timing: BatchTiming) -> None:
        """Take the result of one slice; that of a request which has its answer already is dropped."""
        held = part.held
        if held.is_settling or held.tag not in self._intake:
            return
        for name in ("tokenization_ms", "inference_ms", "postprocessing_ms"):
            held.timing[name] = max(held.timing.get(name, 0.0), getattr(timing, name))
        held.tokens_used += result.tokens
        if result.error is not None:
            error = error_in_request(result.error, first=part.first)
            failed = Outcome(task_id=held.id, model=held.ticket.model, spec=held.served, error=error)
            self._settler.settle(held, failed)
            return
        held.results[part.place] = result.result
        held.slices_left -= 1
        if held.slices_left == 0:
            self._succeed(held)

    def _succeed(self, held: Held) -> None:
        parts = [part for part in held.results if part is not None]
        outcome = Outcome(
            task_id=held.id,
            model=held.ticket.model,
            spec=held.served,
            result=messages.join_results(parts, held.ticket.operation),
            timing={name: round(value, 3) for name, value in held.timing.items()},
            usage=_usage(held),
            query_id=held.ticket.query_id,
        )
        self._settler.settle(held, outcome)


def _usage(held: Held) -> dict[str, int]:
    """The measured units of a request that succeeded."""
    images = {"images": held.ticket.images} if held.ticket.images else {}
    pairs = {"pairs": held.ticket.items} if held.ticket.operation is Operation.SCORE else {}
    return {"input_tokens": held.tokens_used, **images, **pairs}
