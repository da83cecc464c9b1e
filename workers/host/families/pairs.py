"""Models that score pairs of a query and an item: what their families have in common.

Pairs of many requests stand side by side in a micro-batch: they are tokenised together, sorted by length and packed
into passes. How a pair is worded is a ``Reader``'s, how a pass is run a ``Runner``'s; who is at fault concerns neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from common.errors import FarmError, InferenceError, RequestError
from config_db.spec import ModelSpec
from tasks import scores
from tasks.messages import Request
from workers.host.families import results
from workers.host.families.adaptable import Adaptable, like
from workers.host.packing import Pass, plan


class Tokens(NamedTuple):
    """One tokenised pair: its ids, and of each whether it is of the first text (0) or the second (1)."""

    ids: list[int]
    types: list[int]


class Reader(Protocol):
    """How a model's pairs are worded and tokenised. Of the reader thread: touches no device."""

    def word(self, request: Request, query: str, texts: Sequence[str]) -> list[Any]:
        """A request's pairs as ``tokenise`` takes them; RequestError for what the model cannot be asked."""

    def tokenise(self, worded: Sequence[Any]) -> list[Tokens]:
        """Every pair, cut to the model's length."""


class Runner(Protocol):
    """A loaded module that scores. Of the compute thread."""

    @property
    def bytes(self) -> int:
        """Bytes of its parameters and buffers."""

    def score(self, rows: Sequence[Tokens], one: Pass) -> torch.Tensor:
        """Scores ``[N]`` of one pass's pairs, in its order, float32 on CPU."""

    def on(self, module: torch.nn.Module) -> "Runner":
        """One that runs another module in the same way."""

    @property
    def module(self) -> torch.nn.Module:
        """What it runs."""

    def close(self) -> None:
        """Let the weights go."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The pairs of one request: where they stand in the micro-batch, or the error that answers them."""

    request: Request
    rows: slice
    error: FarmError | None = None


@dataclass(frozen=True, slots=True)
class PreparedPairs:
    """A tokenised micro-batch, laid out over passes."""

    parts: tuple[_Part, ...]
    rows: list[Tokens]
    passes: list[Pass]
    request_tokens: tuple[int, ...]


class PairModel(Adaptable):
    """One loaded model that scores pairs.

    Args:
        pass_tokens: how many tokens one forward pass may hold, padding included.
    """

    def __init__(self, spec: ModelSpec, reader: Reader, runner: Runner, *, pass_tokens: int) -> None:
        self._spec = spec
        self._reader = reader
        self._runner = runner
        self._pass_tokens = pass_tokens
        self.bytes = runner.bytes

    def prepare(self, operation: str, requests: Sequence[Request]) -> PreparedPairs:
        """Check, word and tokenise every pair in one call of the tokenizer."""
        if operation != "score":
            raise RequestError(f"{self._spec.id} does not {operation}; it does score", param="model")
        worded: list[Any] = []
        parts = tuple(self._read(request, worded) for request in requests)
        rows = self._reader.tokenise(worded) if worded else []
        lengths = [len(row.ids) for row in rows]
        passes = plan(lengths, pass_tokens=self._pass_tokens, padded=True)
        return PreparedPairs(parts, rows, passes, tuple(sum(lengths[part.rows]) for part in parts))

    def run(self, prepared: PreparedPairs) -> torch.Tensor:
        """Scores ``[N]`` of all pairs, in the order of the micro-batch."""
        found = torch.empty(len(prepared.rows))
        with torch.inference_mode():
            for one in prepared.passes:
                rows = [prepared.rows[row] for row in one.rows]
                found[torch.tensor(one.rows)] = self._runner.score(rows, one)
        return found

    def finish(self, prepared: PreparedPairs, raw: torch.Tensor) -> list[bytes | FarmError]:
        """The ranking of each request."""
        return [part.error or self._ranking(part.request, raw[part.rows]) for part in prepared.parts]

    @property
    def module(self) -> torch.nn.Module:
        """The whole one: its head takes adapters, too."""
        return self._runner.module

    def on(self, module: torch.nn.Module) -> "PairModel":
        """One that scores with another module."""
        from workers.host.families.pairs_adapted import AdaptedRunner

        return like(self, _runner=AdaptedRunner(self._runner.on(module), next(module.parameters()).device))

    def close(self) -> None:
        """Let the weights go."""
        super().close()
        self._runner.close()

    def _ranking(self, request: Request, found: torch.Tensor) -> bytes | FarmError:
        if not torch.isfinite(found).all():
            return InferenceError(f"{self._spec.id} gave scores that are not finite for this request")
        return scores.ranking(request.items, found.tolist())

    def _read(self, request: Request, worded: list[Any]) -> _Part:
        """Append a request's pairs; one that cannot be read gets its error alone."""
        start = len(worded)
        try:
            query, texts = read_texts(request)
            worded += self._reader.word(request, query, texts)
        except RequestError as error:
            return _Part(request, slice(start, start), error)
        return _Part(request, slice(start, len(worded)))


def read_texts(request: Request) -> tuple[str, list[str]]:
    """The query's text and the items' texts.

    Raises:
        RequestError: one of them has none; of items, all that have none are listed.
    """
    query = _text(request.query)
    if query is None:
        raise RequestError("a query has a text, as a string", param="query.text")
    texts = [_text(item) for item in request.items]
    errors = {
        place: RequestError("an item has a text, as a string", param=f"items[{place}].text")
        for place, text in enumerate(texts)
        if text is None
    }
    if errors:
        raise results.item_errors(errors)
    return query, [text for text in texts if text is not None]


def _text(item: Any) -> str | None:
    text = item.get("text") if isinstance(item, Mapping) else item
    return text if isinstance(text, str) else None
