"""What every extractor has in common: reading requests, laying texts out over passes, writing what was found.

An extractor wraps one library's model. It turns a text into rows (one sequence each, as the model reads it), collates
rows into a pass, runs the pass, and says what the rows of a text tell of it. Tokenising is done under a lock: the
tokenizers of the libraries keep settings that two threads must not change at once.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Final, Protocol

import torch

from common.errors import FarmError, InferenceError, InputTooLongError, RequestError
from config_db.spec import ModelSpec
from tasks import codec
from tasks.messages import Request
from workers.host.encoder import bytes_of
from workers.host.families.dense_folder import refusal
from workers.host.packing import plan

OVERFLOW_POLICIES: Final = ("error", "truncate")
"""What becomes of a text that is longer than the model takes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence that a model reads; rows of equal ``group`` may share a pass. ``tokens`` is at least 1."""

    inputs: Any
    tokens: int
    group: Hashable = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in one text, as clients read it; ``data`` follows the request's schema."""

    entities: Sequence[Mapping[str, Any]] = ()
    relations: Sequence[Mapping[str, Any]] = ()
    classifications: Sequence[Mapping[str, Any]] = ()
    data: Mapping[str, Any] | None = None


class Extractor(Protocol):
    """One library's model behind ``ExtractModel``; ``module`` holds its weights."""

    @property
    def module(self) -> torch.nn.Module:
        """The torch module."""

    def ask(self, request: Request, options: "Options") -> Any:
        """What a request asks of each of its texts, in the family's own form; RequestError if it cannot be asked."""

    def rows(self, text: str, ask: Any) -> list[Row]:
        """A text as the model reads it, in host memory; RequestError if this text cannot be read."""

    def collate(self, rows: Sequence[Row]) -> Any:
        """The rows of one pass, in host memory."""

    def run(self, batch: Any) -> Sequence[Any]:
        """One pass: what the model says of each row, in order, in host memory."""

    def found(self, text: str, ask: Any, rows: Sequence[Row], said: Sequence[Any]) -> Found:
        """What the rows of one text, and what was said of them, tell; InferenceError if that is nothing sensible."""


class Options:
    """A request's options over those of its model, each checked where it is read."""

    def __init__(self, spec: ModelSpec, request: Request) -> None:
        self._own = request.options
        self._model = spec.options

    def number(self, name: str, default: float, *, low: float = 0.0, high: float = 1.0) -> float:
        """A number within bounds."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(name, f"is a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "is true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A text."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "is a text")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of a few texts."""
        value = self._value(name, default)
        if value not in choices:
            raise self.wrong(name, f"is one of {', '.join(choices)}")
        return str(value)

    def count(self, name: str, *, below: int | None) -> int | None:
        """A number of tokens, None if nobody named one."""
        value = self._value(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (below is not None and value >= below):
            bound = "" if below is None else f" below {below}"
            raise self.wrong(name, f"is a number of tokens{bound}")
        return value

    @staticmethod
    def wrong(name: str, what: str) -> RequestError:
        """The error for an option that cannot be read."""
        return RequestError(f"{name} {what}", param=f"params.options.{name}")

    def _value(self, name: str, default: Any) -> Any:
        for options in (self._own, self._model):
            if options.get(name) is not None:
                return options[name]
        return default


@dataclass(frozen=True, slots=True)
class _Text:
    """One item: its place among the rows of the micro-batch, or the error that it is answered with."""

    text: str
    rows: slice
    error: FarmError | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """One request: what it asks and its texts, or the error that answers all of it."""

    request: Request
    ask: Any = None
    texts: tuple[_Text, ...] = ()
    error: FarmError | None = None

    @property
    def rows(self) -> slice:
        """Where the rows of its texts stand, one text's after the other's."""
        return slice(self.texts[0].rows.start, self.texts[-1].rows.stop) if self.texts else slice(0, 0)


@dataclass(frozen=True, slots=True)
class RowPass:
    """Rows that run together, by their places in the micro-batch."""

    places: tuple[int, ...]
    batch: Any


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """A tokenised micro-batch, laid out over passes."""

    parts: tuple[_Part, ...]
    rows: list[Row]
    passes: list[RowPass] = field(default_factory=list)

    @property
    def request_tokens(self) -> tuple[int, ...]:
        """Measured tokens of each request; zero for one that is answered with an error."""
        return tuple(sum(row.tokens for text in part.texts for row in self.rows[text.rows]) for part in self.parts)


class ExtractModel:
    """One loaded extractor, as the host runs it."""

    def __init__(self, spec: ModelSpec, extractor: Extractor, *, pass_tokens: int) -> None:
        self._spec = spec
        self._extractor = extractor
        self._pass_tokens = min(spec.limits.max_batch_tokens or pass_tokens, pass_tokens)
        self._tokenising = Lock()
        self.bytes = bytes_of(extractor.module)

    def prepare(self, operation: str, requests: Sequence[Request]) -> PreparedRows:
        """Check and tokenise every text, and collate the passes, in host memory."""
        if operation != "extract":
            raise RequestError(f"{self._spec.id} does not {operation}", param="model")
        rows: list[Row] = []
        with self._tokenising:
            parts = tuple(self._read(request, rows) for request in requests)
            return PreparedRows(parts, rows, self._passes(rows))

    def run(self, prepared: PreparedRows) -> list[Any]:
        """What the model says of each row, in the order of the micro-batch."""
        said: list[Any] = [None] * len(prepared.rows)
        with torch.inference_mode():
            for one in prepared.passes:
                for place, answer in zip(one.places, self._run_pass(one), strict=True):
                    said[place] = answer
        return said

    def finish(self, prepared: PreparedRows, raw: list[Any]) -> list[bytes | FarmError]:
        """Each request's results, one an item; a request at fault as a whole gets its error."""
        return [self._answer(part, prepared.rows, raw) for part in prepared.parts]

    def close(self) -> None:
        """Let the weights go."""
        self._extractor = None  # type: ignore[assignment]  # a closed model runs no more

    def _run_pass(self, one: RowPass) -> Sequence[Any]:
        return self._extractor.run(one.batch)

    def _read(self, request: Request, rows: list[Row]) -> _Part:
        """Append a request's rows; one that cannot be asked gets its error alone."""
        try:
            ask = self._extractor.ask(request, Options(self._spec, request))
        except RequestError as error:
            return _Part(request, error=error)
        return _Part(request, ask, tuple(self._text(item, ask, rows) for item in request.items))

    def _text(self, item: Any, ask: Any, rows: list[Row]) -> _Text:
        """Append an item's rows; one that cannot be read gets its error alone."""
        start = len(rows)
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            error = RequestError("an item has a text, as a string")
            return _Text("", slice(start, start), error)
        try:
            rows += self._extractor.rows(text, ask)
        except RequestError as error:
            return _Text(text, slice(start, start), error)
        return _Text(text, slice(start, len(rows)))

    def _passes(self, rows: Sequence[Row]) -> list[RowPass]:
        groups: dict[Hashable, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row.group, []).append(place)
        found = []
        for places in groups.values():
            for one in plan([rows[place].tokens for place in places], pass_tokens=self._pass_tokens, padded=True):
                chosen = tuple(places[at] for at in one.rows)
                found.append(RowPass(chosen, self._extractor.collate([rows[place] for place in chosen])))
        return found

    def _answer(self, part: _Part, rows: list[Row], said: list[Any]) -> bytes | FarmError:
        if part.error is not None:
            return part.error
        found = []
        for item, text in zip(part.request.items, part.texts, strict=True):
            found.append(_result(item, self._found(text, part.ask, rows, said)))
        return codec.pack(found)

    def _found(self, text: _Text, ask: Any, rows: list[Row], said: list[Any]) -> Found | FarmError:
        if text.error is not None:
            return text.error
        try:
            return self._extractor.found(text.text, ask, rows[text.rows], said[text.rows])
        except InferenceError as error:
            return error


def check_labels(spec: ModelSpec, request: Request) -> tuple[str, ...]:
    """The labels of a request to a model that needs some; RequestError if it names none."""
    if not request.labels:
        raise RequestError(f"{spec.id} needs labels: name what to look for", param="params.labels")
    return tuple(request.labels)


def check_takes_no(spec: ModelSpec, request: Request, *names: str) -> None:
    """RequestError if the request holds something of these names that the model has no use for."""
    for name in names:
        if getattr(request, name):
            raise RequestError(f"{spec.id} takes no {name}", param=f"params.{name}")


def check_length(
    spec: ModelSpec, have: int, most: int | None, *, unit: str = "tokens", can_truncate: bool = True
) -> None:
    """InputTooLongError for a text that is longer than its model takes."""
    if most is not None and have > most:
        remedy = ", or set overflow_policy to 'truncate' to have only its beginning read" if can_truncate else ""
        raise InputTooLongError(f"the text has {have} {unit}, and {spec.id} takes {most}: cut it into parts{remedy}")


def check_finite(spec: ModelSpec, numbers: torch.Tensor) -> None:
    """InferenceError unless all are numbers: a comparison with a threshold would silently drop those that are not."""
    if not torch.isfinite(numbers).all():
        raise not_finite(spec)


def not_finite(spec: ModelSpec) -> InferenceError:
    """The error of an item for which a model gave no numbers."""
    return InferenceError(f"{spec.id} gave numbers that are not finite for this item")


def entity(text: str, label: str, score: float, start: int, end: int) -> dict[str, Any]:
    """An entity that stands at ``text[start:end]``."""
    return {"text": text[start:end], "label": label, "score": score, "start": start, "end": end, "bbox": None}


def check_options(spec: ModelSpec, extractor: Extractor) -> None:
    """A refusal if the options that the spec sets are none that the family takes."""
    request = Request(items=[], labels=["label"])
    try:
        extractor.ask(request, Options(spec, request))
    except RequestError as error:
        if (error.param or "").startswith("params.options."):
            raise refusal(f"its options are wrong: {error.message}") from error


def _result(item: Any, found: Found | FarmError) -> dict[str, Any]:
    """One item's result; ``id`` is the item's own, which the door has made sure of."""
    name = item.get("id") if isinstance(item, Mapping) else None
    error = found if isinstance(found, FarmError) else None
    what = Found() if isinstance(found, FarmError) else found
    result = {
        "id": name,
        "entities": list(what.entities),
        "relations": list(what.relations),
        "classifications": list(what.classifications),
        "objects": [],
        "data": what.data,
    }
    return result if error is None else {**result, "error": {"code": error.code, "message": error.message}}
