"""BGE-M3 and its kin: a dense vector, weights of words and a vector for each token, from one forward pass.

The dense vector is the first token's state. The weight of a word is the largest of its tokens', by a linear layer of
one output; special tokens have none. The vectors of the tokens, all but the first, come from another linear layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from common.errors import FarmError
from config_db.spec import ModelSpec
from tasks import scores
from tasks.messages import Request
from workers.host.encoder import bytes_of
from workers.host.families import results
from workers.host.families.adaptable import Adaptable, like
from workers.host.families.dense_folder import Folder, read_json, refusal, with_settings
from workers.host.families.kept_folders import Recent, estimate_bytes
from workers.host.families.multivector import Vectors, unit_rows
from workers.host.families.opening import Opened, Openings, Verdict
from workers.host.families.protocol import Device
from workers.host.families.request_texts import (
    Part,
    check_flags,
    check_operation,
    folder_words,
    not_finite,
    output_dtype,
    read_parts,
    wanted_outputs,
)
from workers.host.families.text_folder import load_tokenizer, longest_text
from workers.host.families.token_encoder import TokenEncoder, opening, token_encoder, vocabulary_size
from workers.host.families.token_projection import linear_of
from workers.host.maxsim import maxsim
from workers.host.packing import Pass

SPECIALS: Final = ("cls_token", "eos_token", "pad_token", "unk_token", "bos_token")
"""Tokens that are no words."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one pass makes of a text: its dense vector ``[D]``, its tokens' weights ``[T]`` and vectors ``[T - 1, D]``.

    None where no request of the micro-batch wants it.
    """

    dense: npt.NDArray[np.float32] | None = None
    weights: npt.NDArray[np.float32] | None = None
    vectors: Vectors | None = None

    @property
    def is_finite(self) -> bool:
        """Whether every number is."""
        return all(np.isfinite(one).all() for one in (self.dense, self.weights, self.vectors) if one is not None)


@dataclass(slots=True)
class _Kept:
    """What outlives the eviction of a model: everything but its weights."""

    folder: Folder
    tokenizer: Tokenizer
    specials: npt.NDArray[np.int64]
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class PreparedTexts:
    """A tokenised micro-batch, laid out over passes."""

    operation: str
    parts: tuple[Part, ...]
    outputs: frozenset[str]
    ids: list[list[int]]
    passes: list[Pass]
    request_tokens: tuple[int, ...]


class Heads(torch.nn.Module):
    """The two linear layers over the states, in float32."""

    def __init__(self, sparse: torch.nn.Linear, vectors: torch.nn.Linear) -> None:
        super().__init__()
        self.sparse = sparse
        self.vectors = vectors

    def found(self, states: torch.Tensor, lengths: Sequence[int], outputs: frozenset[str]) -> list[Found]:
        """What the heads make of texts that stand side by side, states ``[tokens, width]``, by text."""
        states = states.float()
        starts = [0, *np.cumsum(lengths)]
        dense = states[starts[:-1]].cpu().numpy() if "dense" in outputs else None
        weights = self.sparse(states).squeeze(-1).cpu().numpy() if "sparse" in outputs else None
        vectors = self.vectors(states).cpu().numpy() if "multivector" in outputs else None
        return [
            Found(
                None if dense is None else dense[row],
                None if weights is None else weights[start:end],
                None if vectors is None else vectors[start + 1 : end],
            )
            for row, (start, end) in enumerate(pairwise(starts))
        ]


class BgeM3Model(Adaptable):
    """One loaded model."""

    def __init__(self, spec: ModelSpec, kept: _Kept, opened: Opened, runner: TokenEncoder, heads: Heads) -> None:
        self._spec = spec
        self._opened = opened
        self._kept = kept
        self._runner = runner
        self._heads = heads
        self._words = folder_words(spec, kept.folder)
        self._dims = vocabulary_size(opened.module)
        self.bytes = bytes_of(opened.module) + bytes_of(heads)

    def prepare(self, operation: str, requests: Sequence[Request]) -> PreparedTexts:
        """Check, word and tokenise every text in one call of the tokenizer."""
        check_operation(operation, self._spec, ("encode", "score"))
        parts, texts = read_parts(operation, requests, check=self._check, words=self._words)
        outputs = {output for part in parts for output in part.outputs} if operation == "encode" else {"multivector"}
        encodings = self._kept.tokenizer.encode_batch_fast([text.text for text in texts]) if texts else []
        ids = [encoding.ids or [0] for encoding in encodings]
        lengths = [len(one) for one in ids]
        counts = tuple(sum(lengths[part.rows]) for part in parts)
        return PreparedTexts(operation, tuple(parts), frozenset(outputs), ids, self._runner.passes(lengths), counts)

    def run(self, prepared: PreparedTexts) -> list[Found]:
        """What is wanted of every text, in order."""
        return all_found(self._runner, self._heads, prepared.ids, prepared.passes, prepared.outputs)

    def finish(self, prepared: PreparedTexts, raw: list[Found]) -> list[bytes | FarmError]:
        """Write what each request asked for, or the ranking of its items."""
        return [part.error or self._answer(prepared, part, raw[part.rows]) for part in prepared.parts]

    @property
    def module(self) -> torch.nn.Module:
        """The encoder; the heads take no adapters."""
        return self._opened.module

    def on(self, module: torch.nn.Module) -> "BgeM3Model":
        """One that encodes with another module."""
        return like(self, _runner=self._runner.on(module))

    def close(self) -> None:
        """Let the weights go."""
        super().close()
        del self._runner
        del self._heads
        self._opened.close()

    def _answer(self, prepared: PreparedTexts, part: Part, found: Sequence[Found]) -> bytes | FarmError:
        if not all(one.is_finite for one in found):
            return not_finite(self._spec)
        if prepared.operation == "score":
            query, *documents = [self._vectors(part.request, one) for one in found]
            return scores.ranking(part.request.items, maxsim(query, documents))
        outputs = [self._output(part, one, ids) for one, ids in zip(found, prepared.ids[part.rows], strict=True)]
        return results.item_list(part.request.items, outputs)

    def _output(self, part: Part, found: Found, ids: Sequence[int]) -> dict[str, Any]:
        """The outputs of one item."""
        dtype = output_dtype(part.request)
        output: dict[str, Any] = {}
        if "dense" in part.outputs:
            assert found.dense is not None  # it was among the outputs of the micro-batch
            row = found.dense[None]
            row = results.quantize(unit_rows(row) if self._normalizes(part.request) else row, dtype)[0]
            output["dense"] = results.dense_output(row, dims=len(found.dense), dtype=dtype)
        if "sparse" in part.outputs:
            assert found.weights is not None  # likewise
            indices, values = words_of(ids, found.weights, self._kept.specials)
            output["sparse"] = results.sparse_output(indices, values, dims=self._dims, dtype=dtype)
        if "multivector" in part.outputs:
            output["multivector"] = results.multivector_output(self._vectors(part.request, found), dtype=dtype)
        return output

    def _vectors(self, request: Request, found: Found) -> Vectors:
        assert found.vectors is not None  # it was among the outputs of the micro-batch
        return unit_rows(found.vectors) if self._normalizes(request) else found.vectors

    def _normalizes(self, request: Request) -> bool:
        wanted = request.options.get("normalize")
        return self._kept.folder.normalize if wanted is None else bool(wanted)

    def _check(self, request: Request) -> tuple[str, ...]:
        output_dtype(request)
        check_flags(request, "normalize")
        return wanted_outputs(request, self._spec)


class BgeM3Family:
    """Loads such models."""

    def __init__(self) -> None:
        self._kept = Recent(_read)
        self._openings = Openings()

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """Device bytes, as far as the weight files tell."""
        suffixes = (".safetensors", ".pt", ".bin") if "pickle" in spec.trust.formats else (".safetensors",)
        return estimate_bytes(self._kept, spec, files, (one for one in files.iterdir() if one.suffix in suffixes))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> BgeM3Model:
        """Load the model of a folder; the first time also find out how it runs best."""
        kept = self._kept.recall(spec, files)
        heads = Heads(_read_head(files, "sparse_linear", spec), _read_head(files, "colbert_linear", spec))
        heads = heads.requires_grad_(requires_grad=False).to(device.name)

        def vectors(_: torch.nn.Module, runner: TokenEncoder, texts: Sequence[str]) -> torch.Tensor:
            return _check_vectors(runner, heads, kept.tokenizer, texts)

        opened, layout = self._openings.open(opening(spec, files, files, device, vectors=vectors), kept, device)
        runner = token_encoder(spec, opened.module, layout, device)
        return BgeM3Model(spec, kept, opened, runner, heads)


def _read(spec: ModelSpec, files: Path) -> _Kept:
    folder = _read_folder(files, spec)
    tokenizer = load_tokenizer(files, longest_text(files, folder.max_length))
    return _Kept(folder, tokenizer, _special_ids(files, tokenizer))


def all_found(
    runner: TokenEncoder, heads: Heads, ids: Sequence[Sequence[int]], passes: Sequence[Pass], outputs: frozenset[str]
) -> list[Found]:
    """What the heads make of every text, in order."""
    found: dict[int, Found] = {}
    with torch.inference_mode():
        for one in passes:
            blocks = list(runner.states(ids, one))
            places = [place for rows, _ in blocks for place in rows]
            states = torch.cat([block.flatten(0, 1) for _, block in blocks])
            made = heads.found(states, [len(ids[place]) for place in places], outputs)
            found.update(zip(places, made, strict=True))
    return [found[place] for place in range(len(ids))]


def words_of(
    ids: Sequence[int], weights: npt.NDArray[np.float32], specials: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The words of a text, in the order of their ids, and the largest weight of each, if it is above zero."""
    tokens = np.array(ids)
    counted = (weights > 0) & ~np.isin(tokens, specials)
    words, places = np.unique(tokens[counted], return_inverse=True)
    values = np.zeros(len(words), dtype=np.float32)
    np.maximum.at(values, places, weights[counted])
    return words.astype(np.int32), values


def _read_folder(files: Path, spec: ModelSpec) -> Folder:
    """How texts are read; a first token's vector, at unit length, unless the spec says otherwise."""
    if (spec.pooling or "cls") != "cls":
        raise refusal(f"its dense vector is its first token's; {spec.pooling!r} is none that the family does")
    text = with_settings(files, Folder(transformer=files))
    return replace(
        text,
        normalize=True if spec.normalize is None else spec.normalize,
        max_length=spec.max_length or text.max_length,
        prompts={**text.prompts, **spec.prompts},
        default_prompt=spec.default_prompt or text.default_prompt,
    )


def _special_ids(files: Path, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    names: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        names.update(read_json(files / name) or {})
    contents = [one.get("content") if isinstance(one, dict) else one for one in map(names.get, SPECIALS)]
    found = (tokenizer.token_to_id(content) for content in contents if isinstance(content, str))
    return np.array(sorted(one for one in found if one is not None), dtype=np.int64)


def _read_head(files: Path, name: str, spec: ModelSpec) -> torch.nn.Linear:
    """A linear layer, from safetensors, or from torch's own format where the spec trusts it: read as numbers only."""
    path = files / f"{name}.safetensors"
    if path.exists():
        return linear_of(load_file(path))
    path = files / f"{name}.pt"
    if "pickle" in spec.trust.formats and path.exists():
        return linear_of(torch.load(path, map_location="cpu", weights_only=True))
    raise refusal(f"it holds no {name}.safetensors; other formats are loaded only where its spec trusts `pickle`")


def _check_vectors(runner: TokenEncoder, heads: Heads, tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """The dense vectors and all token vectors of texts."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    passes = runner.passes([len(one) for one in ids])
    found = all_found(runner, heads, ids, passes, frozenset(("dense", "multivector")))
    rows = [one for each in found for one in (each.dense, *(each.vectors if each.vectors is not None else ()))]
    width = max(len(row) for row in rows if row is not None)
    matrix = np.zeros((len(rows), width), dtype=np.float32)
    for place, row in enumerate(rows):
        if row is not None:
            matrix[place, : len(row)] = row
    return torch.from_numpy(matrix)
