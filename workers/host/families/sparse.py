"""Sparse encoders: one weight for each word of the vocabulary, most of them zero (SPLADE and its inference-free kin).

The logits of a text are as wide as the vocabulary, so they are never laid out for a whole pass: the head runs over a
bounded piece of the pass's tokens at a time, and each text's weights are pooled and thinned out before the next.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM
from transformers.modeling_outputs import BaseModelOutput

from common.errors import FarmError, RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.encoder import bytes_of
from workers.host.families import results
from workers.host.families.adaptable import Adaptable, like
from workers.host.families.dense_folder import UNBOUNDED, read_json, refusal
from workers.host.families.kept_folders import Recent, estimate_bytes
from workers.host.families.opening import Opened, Openings, Verdict
from workers.host.families.protocol import Device
from workers.host.families.request_texts import (
    Part,
    check_operation,
    folder_words,
    not_finite,
    output_dtype,
    read_parts,
    wanted_outputs,
)
from workers.host.families.sparse_folder import SparseFolder, read_sparse_folder
from workers.host.families.text_folder import load_tokenizer, longest_text
from workers.host.families.token_encoder import TokenEncoder, opening, token_encoder, vocabulary_size
from workers.host.packing import Pass

LOGITS: Final = 2**24
"""Logits at once: 64 MiB in float32, or 549 tokens over the words of BERT."""


class Weights(NamedTuple):
    """The words of one text that have a weight, in order, int32, and these weights, float32."""

    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Table:
    """The queries' way of a model whose queries need no encoder: a weight for every token there may be."""

    tokenizer: Tokenizer
    weights: npt.NDArray[np.float32]

    def look_up(self, ids: Sequence[int]) -> Weights:
        """The weights of the tokens of a query, each once."""
        indices = np.unique(np.array(ids, dtype=np.int32))
        values = self.weights[indices]
        return Weights(indices[values != 0], values[values != 0])


@dataclass(slots=True)
class _Kept:
    """What outlives the eviction of a model: everything but its weights."""

    folder: SparseFolder
    tokenizer: Tokenizer
    table: Table | None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class PreparedTexts:
    """A tokenised micro-batch: ``ids`` of all texts, of which some are ``looked_up``, and the others run in passes."""

    parts: tuple[Part, ...]
    ids: list[list[int]]
    looked_up: list[int]
    passes: list[Pass]
    request_tokens: tuple[int, ...]


class Head:
    """The masked language model without its encoder: logits of the states it is given.

    It is transformers' own model, in which a stand-in takes the encoder's place.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._given = _Given()
        prefix = str(module.base_model_prefix)
        self._shell = copy.copy(module)
        self._shell._modules = {**module._modules, prefix: self._given}  # noqa: SLF001 - the model itself stays whole

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits ``[tokens, words]`` of states ``[tokens, width]``."""
        self._given.states = states.unsqueeze(0)
        logits: torch.Tensor = self._shell().logits
        return logits.squeeze(0)


class _Given(torch.nn.Module):
    """Stands where an encoder stood, and gives the states that it was handed."""

    states: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.states)  # type: ignore[arg-type]  # any tensor will do


class States(NamedTuple):
    """The states ``[tokens, width]`` of a pass's texts, side by side: who they are, and where each ends."""

    places: list[int]
    ends: list[int]
    states: torch.Tensor


class Splade:
    """The documents' way: an encoder, the head over the vocabulary, and the pooling over a text's tokens."""

    def __init__(self, module: torch.nn.Module, runner: TokenEncoder, folder: SparseFolder) -> None:
        self.encoder = runner
        self._module = module
        self._folder = folder
        self.piece_tokens = max(1, LOGITS // vocabulary_size(module))

    def weights(self, ids: Sequence[Sequence[int]], passes: Sequence[Pass]) -> dict[int, Weights]:
        """The weights of texts, by their places in ``ids``."""
        found: dict[int, Weights] = {}
        for one in passes:
            for places, rows in self._rows(ids, one):
                found.update(zip(places, _thinned(rows), strict=True))
        return found

    def _rows(self, ids: Sequence[Sequence[int]], one: Pass) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Weights ``[count, words]`` of a pass's texts, float32, a bounded number at a time."""
        places: list[int] = []
        states: list[torch.Tensor] = []
        for rows, block in self.encoder.states(ids, one):
            places += rows
            states.append(block.reshape(-1, block.shape[-1]))
        ends = [int(end) for end in np.cumsum([len(ids[place]) for place in places])]
        texts = States(places, ends, torch.cat(states))
        row, begin, begun = 0, 0, None
        for start in range(0, ends[-1], self.piece_tokens):
            logits = self._activated(self._logits(texts, start))
            whole: list[torch.Tensor] = []
            first = row
            while row < len(places) and begin < start + len(logits):
                stop = min(ends[row], start + len(logits))
                part = self._pool(logits[max(begin, start) - start : stop - start])
                begun = part if begun is None else self._pool(torch.stack([begun, part]))
                if stop < ends[row]:  # the rest of this text is in the next piece
                    break
                whole.append(begun)
                row, begin, begun = row + 1, ends[row], None
            if whole:
                yield places[first:row], self._finished(torch.stack(whole))

    @cached_property
    def _head(self) -> Head:
        return Head(self._module)

    def _logits(self, texts: States, start: int) -> torch.Tensor:
        """Logits of the piece that begins with token ``start``."""
        return self._head.logits(texts.states[start : start + self.piece_tokens])

    def _activated(self, logits: torch.Tensor) -> torch.Tensor:
        """What is pooled: for the maximum the logits themselves, as what follows keeps their order."""
        return logits if self._folder.pooling == "max" else self._weighed(logits.float())

    def _pool(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.amax(dim=0) if self._folder.pooling == "max" else rows.sum(dim=0)

    def _finished(self, rows: torch.Tensor) -> torch.Tensor:
        return self._weighed(rows.float()) if self._folder.pooling == "max" else rows

    def _weighed(self, logits: torch.Tensor) -> torch.Tensor:
        weights = logits.relu().log1p_()
        return weights.log1p_() if self._folder.activation == "log1p_relu" else weights


class SparseModel(Adaptable):
    """One loaded sparse encoder."""

    def __init__(self, spec: ModelSpec, kept: _Kept, opened: Opened, runner: TokenEncoder) -> None:
        self._spec = spec
        self._kept = kept
        self._opened = opened
        self._splade = Splade(opened.module, runner, kept.folder)
        self._words = folder_words(spec, kept.folder.text)
        self._dims = vocabulary_size(opened.module)
        self.bytes = bytes_of(opened.module)

    def prepare(self, operation: str, requests: Sequence[Request]) -> PreparedTexts:
        """Check, word and tokenise every text: queries of an inference-free model for the table, others to encode."""
        check_operation(operation, self._spec, ("encode",))
        parts, texts = read_parts(operation, requests, check=self._check, words=self._words)
        table = self._kept.table
        untold = self._kept.folder.untold_is_query
        is_looked_up = [table is not None and (untold if text.is_query is None else text.is_query) for text in texts]
        encoded = [place for place, looked_up in enumerate(is_looked_up) if not looked_up]
        looked_up = [place for place, looked_up in enumerate(is_looked_up) if looked_up]
        ids: list[list[int]] = [[] for _ in texts]
        for place, encoding in zip(
            encoded, self._kept.tokenizer.encode_batch_fast([texts[place].text for place in encoded]), strict=True
        ):
            ids[place] = encoding.ids or [0]
        if table is not None:
            queries = [texts[place].text for place in looked_up]
            tokens = table.tokenizer.encode_batch_fast(queries, add_special_tokens=False)
            for place, encoding in zip(looked_up, tokens, strict=True):
                ids[place] = encoding.ids
        lengths = [len(one) for one in ids]
        counts = tuple(sum(lengths[part.rows]) for part in parts)
        return PreparedTexts(tuple(parts), ids, looked_up, self._splade.encoder.passes(lengths, encoded), counts)

    def run(self, prepared: PreparedTexts) -> list[Weights]:
        """The weights of every text, in order."""
        with torch.inference_mode():
            found = self._splade.weights(prepared.ids, prepared.passes)
        for place in prepared.looked_up:
            assert self._kept.table is not None  # nothing is looked up without one
            found[place] = self._kept.table.look_up(prepared.ids[place])
        return [found[place] for place in range(len(prepared.ids))]

    def finish(self, prepared: PreparedTexts, raw: list[Weights]) -> list[bytes | FarmError]:
        """Write each request's weights as it asked for them."""
        return [part.error or self._answer(part, raw[part.rows]) for part in prepared.parts]

    @property
    def module(self) -> torch.nn.Module:
        """The whole one: its head takes adapters, too."""
        return self._opened.module

    def on(self, module: torch.nn.Module) -> "SparseModel":
        """One that encodes with another module; what is looked up runs none."""
        from workers.host.families.sparse_adapted import AdaptedSplade

        splade = AdaptedSplade(module, self._splade.encoder.on(_base(module)), self._kept.folder)
        return like(self, _splade=splade)

    def close(self) -> None:
        """Let the weights go."""
        super().close()
        del self._splade
        self._opened.close()

    def _answer(self, part: Part, rows: Sequence[Weights]) -> bytes | FarmError:
        if not all(np.isfinite(row.values).all() for row in rows):
            return not_finite(self._spec)
        dtype, most = output_dtype(part.request), self._most_active(part.request)
        outputs = [
            {"sparse": results.sparse_output(row.indices, row.values, dims=self._dims, dtype=dtype)}
            for row in (_heaviest(row, most) for row in rows)
        ]
        return results.item_list(part.request.items, outputs)

    def _check(self, request: Request) -> tuple[str, ...]:
        output_dtype(request)
        self._most_active(request)
        return wanted_outputs(request, self._spec)

    def _most_active(self, request: Request) -> int | None:
        asked = request.options.get("max_active_dims", self._kept.folder.max_active_dims)
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
            raise RequestError("max_active_dims is a whole number from 1", param="params.options.max_active_dims")
        return asked


class SparseFamily:
    """Loads sparse encoders."""

    def __init__(self) -> None:
        self._kept = Recent(_read)
        self._openings = Openings(AutoModelForMaskedLM, _base)

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """Device bytes, as far as the weight files tell."""
        place = read_sparse_folder(files, spec).text.transformer
        return estimate_bytes(self._kept, spec, files, place.glob("*.safetensors"))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> SparseModel:
        """Load the model of a folder; the first time also find out how it runs best."""
        kept = self._kept.recall(spec, files)

        def vectors(module: torch.nn.Module, runner: TokenEncoder, texts: Sequence[str]) -> torch.Tensor:
            return _check_vectors(Splade(module, runner, kept.folder), kept.tokenizer, texts)

        how = opening(spec, files, kept.folder.text.transformer, device, base=_base, vectors=vectors)
        opened, layout = self._openings.open(how, kept, device)
        return SparseModel(spec, kept, opened, token_encoder(spec, _base(opened.module), layout, device))


def _read(spec: ModelSpec, files: Path) -> _Kept:
    folder = read_sparse_folder(files, spec)
    place = folder.text.transformer
    tokenizer = load_tokenizer(place, longest_text(place, folder.text.max_length))
    return _Kept(folder, tokenizer, None if folder.table is None else _load_table(folder.table))


def _base(module: torch.nn.Module) -> torch.nn.Module:
    base: torch.nn.Module = module.base_model  # type: ignore[assignment]  # transformers' own
    return base


def _check_vectors(splade: Splade, tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Weights ``[N, words]`` of texts, as a matrix."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    passes = splade.encoder.passes([len(one) for one in ids])
    with torch.inference_mode():
        rows = splade.weights(ids, passes)
    width = 1 + max(int(row.indices[-1]) for row in rows.values() if len(row.indices))
    matrix = np.zeros((len(ids), width), dtype=np.float32)
    for place, row in rows.items():
        matrix[place, row.indices] = row.values
    return torch.from_numpy(matrix)


def _thinned(rows: torch.Tensor) -> list[Weights]:
    """Rows ``[count, words]`` without their zeros."""
    places = rows.nonzero()
    values = rows[places[:, 0], places[:, 1]].cpu().numpy()
    places_there = places.cpu().numpy()
    bounds = np.searchsorted(places_there[:, 0], np.arange(len(rows) + 1))
    indices = places_there[:, 1].astype(np.int32)
    return [Weights(indices[a:b], values[a:b]) for a, b in pairwise(bounds)]


def _heaviest(row: Weights, most: int | None) -> Weights:
    """The ``most`` largest weights, in the order of the words."""
    if most is None or len(row.values) <= most:
        return row
    kept = np.sort(np.argsort(-row.values, kind="stable")[:most])
    return Weights(row.indices[kept], row.values[kept])


def _load_table(place: Path) -> Table:
    """The queries' token weights, with the tokenizer that they are for."""
    path = place / "model.safetensors"
    if not path.exists():
        raise refusal(f"its table {place.name} holds no safetensors weights; other formats are not loaded")
    longest = (read_json(place / "tokenizer_config.json") or {}).get("model_max_length")
    tokenizer = load_tokenizer(place, longest if isinstance(longest, int) and longest < UNBOUNDED else None)
    return Table(tokenizer, load_file(path)["weight"].float().numpy())
