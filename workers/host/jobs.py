"""What the compute thread is given: the parts of a micro-batch, by the model, or model with adapters, that runs them.

A micro-batch is one job, unless the adapters that its parts name do not fit on the device together. Its parts without
an adapter run on the base itself; the others share forward passes where the model can do that.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from common.errors import FarmError, RequestError
from config_db.adapters import adapter_digest, adapter_source
from config_db.spec import Source
from tasks.messages import Request, decode_body
from workers.host.adapters import PARAM
from workers.host.batches import BatchRun, Times
from workers.host.families.protocol import Model
from workers.host.frames import Answer, Batch, Done


@dataclass(slots=True)
class Progress:
    """A micro-batch on its way: what has been answered so far, and the time that took. The compute thread's."""

    batch: Batch
    load_s: float
    times: Times = field(default_factory=Times)
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def is_answered(self) -> bool:
        """Whether every part is."""
        return len(self.answers) == len(self.batch.parts)

    def done(self) -> Done:
        """What the worker is told in the end."""
        return Done(
            self.batch.id,
            [self.answers[place] for place in range(len(self.batch.parts))],
            tokenization_ms=self.times.tokenization_ms,
            inference_ms=self.times.inference_ms,
            postprocessing_ms=self.times.postprocessing_ms,
            load_s=self.load_s,
            tokens=sum(answer.tokens for answer in self.answers.values()),
        )


@dataclass(slots=True)
class Job:
    """Parts of a micro-batch whose model and ``adapters`` are leased, by place; ``refused`` need no computing."""

    progress: Progress
    runs: Sequence[tuple[Sequence[int], BatchRun]]
    refused: Mapping[int, Answer] = field(default_factory=dict)
    adapters: Collection[str] = ()

    @property
    def requests(self) -> list[Request]:
        """Those that are computed."""
        return [request for _, run in self.runs for request in run.requests]


def adapter_of(batch: Batch, place: int) -> str | None:
    """The digest of a part's adapter."""
    return batch.adapters[place] if batch.adapters else None


def adapters_of(batch: Batch) -> set[str]:
    """The digests of all adapters that parts name."""
    return {name for name in batch.adapters if name} if batch.adapters else set()


def sources_of(batch: Batch) -> dict[str, Source]:
    """Where the adapters come from; of damaged parts, which are going to be refused, nothing is said."""
    found: dict[str, Source] = {}
    for place, body in enumerate(batch.parts):
        name = adapter_of(batch, place)
        if name is not None and name not in found:
            try:
                found[name] = _checked_source(decode_body(body)[1], name)
            except FarmError:
                continue
    return found


def decoded(batch: Batch, place: int) -> Request:
    """The request of a part; where it has an adapter, ``options["lora"]`` is the digest that it goes by from here on.

    Raises:
        FarmError: the body is damaged, or means another adapter than the one that was asked for on its behalf.
    """
    model, request = decode_body(batch.parts[place])
    name = adapter_of(batch, place)
    if name is not None:
        _checked_source(request, name)
        request.options["lora"] = name
    elif request.options.get("lora") is not None:
        raise RequestError(f"the request for {model} was not routed by its adapter", param=PARAM)
    return request


def groups(model: Model, requests: Mapping[int, Request]) -> list[tuple[Model, list[int]]]:
    """Which model runs which parts, given a leased base whose adapters are leased, too."""
    plain: list[int] = []
    adapted: dict[str, list[int]] = defaultdict(list)
    rack: Any = getattr(model, "rack", None) if any("lora" in one.options for one in requests.values()) else None
    for place, request in requests.items():
        name = request.options.get("lora")
        if name is None:
            plain.append(place)
        else:
            adapted["" if rack.mixes else name].append(place)
    runs = [(model, plain)] if plain else []
    return runs + [(cast("Model", rack.model), places) for places in adapted.values()]


def _checked_source(request: Request, name: str) -> Source:
    source = adapter_source(request.options)
    if adapter_digest(source) != name:
        raise RequestError("the request means another adapter than it was routed by", param=PARAM)
    return source
