"""Late-interaction encoders: a vector for each token (ColBERT and its kin), scored by MaxSim.

A query is filled up to a length with mask tokens, whose vectors count though no token attends to them; a document
leaves out the vectors of its punctuation. All of that is as the model's folder says. On demand the vectors of a text
are folded into one of fixed width (``workers.host.muvera``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from common.errors import FarmError, RequestError
from config_db.spec import ModelSpec
from tasks import scores
from tasks.messages import Request
from workers.host.encoder import bytes_of
from workers.host.families import results
from workers.host.families.adaptable import Adaptable, like
from workers.host.families.dense_folder import refusal
from workers.host.families.kept_folders import Recent, estimate_bytes
from workers.host.families.multivector_folder import MultivectorFolder, read_multivector_folder
from workers.host.families.multivector_tokens import TokenReader, Tokens
from workers.host.families.opening import Opened, Openings, Verdict
from workers.host.families.protocol import Device
from workers.host.families.request_texts import (
    Part,
    Text,
    check_flags,
    check_operation,
    folder_words,
    not_finite,
    output_dtype,
    read_parts,
    wanted_outputs,
)
from workers.host.families.token_encoder import TokenEncoder, opening, token_encoder
from workers.host.families.token_projection import read_inner_layer, read_layers
from workers.host.maxsim import maxsim
from workers.host.muvera import Muvera, fixed_vector, read_muvera
from workers.host.packing import plan

CHECK_QUERIES: Final = 2
"""Of the check texts, so many are tried as queries, too."""

Vectors = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Kept:
    """What outlives the eviction of a model: everything but its weights."""

    folder: MultivectorFolder
    reader: TokenReader
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class PreparedTexts:
    """A tokenised micro-batch."""

    operation: str
    parts: tuple[Part, ...]
    texts: list[Text]
    tokens: list[Tokens]
    request_tokens: tuple[int, ...]


class TokenVectors:
    """Projected vectors of every token: the encoder and the layers over it."""

    def __init__(self, runner: TokenEncoder, layers: torch.nn.Module) -> None:
        self._runner = runner
        self._layers = layers

    def of(self, texts: Sequence[Tokens]) -> list[Vectors]:
        """Vectors ``[T, D]`` of each text, of the tokens whose vectors count, in order; not normalised."""
        found: dict[int, Vectors] = {}
        ids = [text.ids for text in texts]
        whole = [place for place, text in enumerate(texts) if text.seen == len(text.ids)]
        with torch.inference_mode():
            for one in self._runner.passes([len(row) for row in ids], whole):
                blocks = [block.flatten(0, 1) for _, block in self._runner.states(ids, one)]
                self._put(found, texts, one.rows, torch.cat(blocks))
            for places in self._partly_seen(texts):
                states = self._runner.partly_seen(ids, places, [texts[place].seen for place in places])
                self._put(found, texts, places, states.flatten(0, 1))
        return [found[place] for place in range(len(texts))]

    def on(self, module: torch.nn.Module) -> "TokenVectors":
        """The same layers over a module with adapters."""
        return TokenVectors(self._runner.on(module), self._layers)

    def _put(
        self, found: dict[int, Vectors], texts: Sequence[Tokens], places: Sequence[int], states: torch.Tensor
    ) -> None:
        """Project the states of texts that stand side by side, and share them out."""
        vectors = self._layers(states.float()).cpu().numpy()
        start = 0
        for place in places:
            end = start + len(texts[place].ids)
            found[place] = vectors[start:end][texts[place].kept]
            start = end

    def _partly_seen(self, texts: Sequence[Tokens]) -> list[tuple[int, ...]]:
        """Places of the filled-up texts of each pass; all of a pass have one length."""
        filled = [place for place, text in enumerate(texts) if text.seen < len(text.ids)]
        lengths = [len(text.ids) for text in texts]
        passes = plan(lengths, pass_tokens=self._runner.pass_tokens, padded=True, places=filled)
        return [
            one.rows[first : first + group.count]
            for one in passes
            for first, group in zip(_firsts(one.groups), one.groups, strict=True)
        ]


def _firsts(groups: Sequence[Any]) -> list[int]:
    counts = [group.count for group in groups]
    return [sum(counts[:at]) for at in range(len(counts))]


class MultivectorModel(Adaptable):
    """One loaded late-interaction encoder."""

    def __init__(
        self, spec: ModelSpec, kept: _Kept, opened: Opened, runner: TokenEncoder, layers: torch.nn.Sequential
    ) -> None:
        self._spec = spec
        self._opened = opened
        self._folder = kept.folder
        self._reader = kept.reader
        self._vectors = TokenVectors(runner, layers)
        self._words = folder_words(spec, kept.folder.text)
        self._dims = width_of(layers)
        self.bytes = bytes_of(opened.module) + bytes_of(layers)

    def prepare(self, operation: str, requests: Sequence[Request]) -> PreparedTexts:
        """Check, mark, word and tokenise every text."""
        check_operation(operation, self._spec, ("encode", "score"))
        parts, texts = read_parts(operation, requests, check=self._check, words=self._words)
        tokens = self._reader.read(texts)
        counts = tuple(sum(one.seen for one in tokens[part.rows]) for part in parts)
        return PreparedTexts(operation, tuple(parts), texts, tokens, counts)

    def run(self, prepared: PreparedTexts) -> list[Vectors]:
        """Vectors ``[T, D]`` of each text, in order, not normalised."""
        return self._vectors.of(prepared.tokens)

    def finish(self, prepared: PreparedTexts, raw: list[Vectors]) -> list[bytes | FarmError]:
        """Normalise, and write each request's vectors, or the ranking of its items."""
        return [
            part.error or self._answer(prepared.operation, part, prepared.texts[part.rows], raw[part.rows])
            for part in prepared.parts
        ]

    @property
    def module(self) -> torch.nn.Module:
        """The encoder; the projection takes no adapters."""
        return self._opened.module

    def on(self, module: torch.nn.Module) -> "MultivectorModel":
        """One that encodes with another module."""
        return like(self, _vectors=self._vectors.on(module))

    def close(self) -> None:
        """Let the weights go."""
        super().close()
        del self._vectors
        self._opened.close()

    def _answer(self, operation: str, part: Part, texts: Sequence[Text], rows: Sequence[Vectors]) -> bytes | FarmError:
        if not all(np.isfinite(row).all() for row in rows):
            return not_finite(self._spec)
        request = part.request
        wanted = request.options.get("normalize")
        if self._folder.normalize if wanted is None else wanted:
            rows = [unit_rows(row) for row in rows]
        if operation == "score":
            return scores.ranking(request.items, maxsim(rows[0], rows[1:]))
        way = self._way(request) if "dense" in part.outputs else None
        dtype = output_dtype(request)
        outputs = []
        for text, row in zip(texts, rows, strict=True):
            output: dict[str, Any] = {}
            if way is not None:
                output["dense"] = _folded(row, way, dtype, is_query=bool(text.is_query))
            if "multivector" in part.outputs:
                output["multivector"] = results.multivector_output(row, dtype=dtype)
            outputs.append(output)
        return results.item_list(request.items, outputs)

    def _check(self, request: Request) -> tuple[str, ...]:
        output_dtype(request)
        check_flags(request, "normalize")
        outputs = wanted_outputs(request, self._spec)
        if "dense" not in outputs and request.options.get("muvera"):
            outputs = ("dense", *(request.output_types or ()))
        if "dense" in outputs:
            self._way(request)
        return outputs

    def _way(self, request: Request) -> Muvera:
        """How the vectors of a text are folded into one: as the request says, else the spec, else as the paper does."""
        asked = request.options.get("muvera") or self._spec.options.get("muvera") or True
        way = read_muvera(asked, token_dims=self._dims, param="params.options.muvera")
        assert way is not None  # true is a way
        return way


class MultivectorFamily:
    """Loads late-interaction encoders."""

    def __init__(self) -> None:
        self._kept = Recent(_read)
        self._openings = Openings()

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """Device bytes, as far as the weight files tell."""
        place = read_multivector_folder(files, spec).text.transformer
        return estimate_bytes(self._kept, spec, files, place.glob("*.safetensors"))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> MultivectorModel:
        """Load the model of a folder; the first time also find out how it runs best."""
        kept = self._kept.recall(spec, files)
        place = kept.folder.text.transformer
        layers = read_layers(kept.folder.layers) if kept.folder.layers else read_inner_layer(place)
        layers = layers.to(device.name)
        _check_way(spec, layers)

        def vectors(_: torch.nn.Module, runner: TokenEncoder, texts: Sequence[str]) -> torch.Tensor:
            return _check_vectors(TokenVectors(runner, layers), kept.reader, texts)

        opened, layout = self._openings.open(opening(spec, files, place, device, vectors=vectors), kept, device)
        runner = token_encoder(spec, opened.module, layout, device)
        return MultivectorModel(spec, kept, opened, runner, layers)


def _read(spec: ModelSpec, files: Path) -> _Kept:
    folder = read_multivector_folder(files, spec)
    return _Kept(folder, TokenReader(folder))


def unit_rows(rows: Vectors) -> Vectors:
    """Rows at unit length; one of zeros stays."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.float32(1e-12)), dtype=np.float32)


def width_of(layers: torch.nn.Sequential) -> int:
    """Numbers in a token's vector."""
    last: Any = layers[-1]
    return int(getattr(last, "linear", last).out_features)


def _check_way(spec: ModelSpec, layers: torch.nn.Sequential) -> None:
    """ModelLoadError where the spec's own way to fold vectors is none."""
    try:
        read_muvera(spec.options.get("muvera"), token_dims=width_of(layers), param="options.muvera")
    except RequestError as error:
        raise refusal(f"options of its spec: {error.message}") from error


def _folded(row: Vectors, way: Muvera, dtype: str, *, is_query: bool) -> dict[str, Any]:
    vector = fixed_vector(row, way, is_query=is_query)
    return results.dense_output(results.quantize(vector[None], dtype)[0], dims=len(vector), dtype=dtype)


def _check_vectors(vectors: TokenVectors, reader: TokenReader, texts: Sequence[str]) -> torch.Tensor:
    """All vectors of the check texts as documents, and of some of them as queries."""
    read = [Text(text, is_query=False) for text in texts]
    read += [Text(text, is_query=True) for text in texts[:CHECK_QUERIES]]
    return torch.from_numpy(np.concatenate(vectors.of(reader.read(read))))
