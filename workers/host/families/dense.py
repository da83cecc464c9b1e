"""Text encoders with one vector a text: any sentence-transformers folder or plain transformers encoder.

How a module comes onto the device, and is found to run best, is for ``opening``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from common.errors import FarmError, InferenceError, RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host import linears
from workers.host.encoder import Encoder, Layout, bytes_of, encoder
from workers.host.families import results
from workers.host.families.adaptable import Adaptable, like
from workers.host.families.dense_folder import POOLINGS, Folder, read_folder, refusal
from workers.host.families.dense_prompts import wording
from workers.host.families.kept_folders import Recent, estimate_bytes
from workers.host.families.opening import Opened, Opening, Openings, Verdict
from workers.host.families.passes import pass_budget
from workers.host.families.protocol import Device
from workers.host.families.shared_tokenizers import SharedTokenizers
from workers.host.families.text_folder import longest_text
from workers.host.packing import Pass, plan

LINEAR_ACTIVATIONS: Final = {
    "Identity": torch.nn.Identity,
    "Tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
    "GELU": torch.nn.GELU,
    "Sigmoid": torch.nn.Sigmoid,
}


@dataclass(slots=True)
class _Kept:
    """What outlives the eviction of a model: everything but its weights."""

    folder: Folder
    tokenizer: Tokenizer
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class _Texts:
    """The texts of one request: where they stand in the micro-batch, or the error that answers them."""

    request: Request
    rows: slice
    pooling: str = ""
    error: FarmError | None = None


@dataclass(frozen=True, slots=True)
class PreparedTexts:
    """A tokenised micro-batch, laid out over passes."""

    parts: tuple[_Texts, ...]
    pooling: str
    ids: list[list[int]]
    passes: list[Pass]
    request_tokens: tuple[int, ...]


class DenseModel(Adaptable):
    """One loaded encoder."""

    def __init__(
        self, spec: ModelSpec, kept: _Kept, opened: Opened, runner: Encoder, head: torch.nn.Module, *, pass_tokens: int
    ) -> None:
        self._spec = spec
        self._folder = kept.folder
        self._tokenizer = kept.tokenizer
        self._opened = opened
        self._encoder = runner
        self._head = head
        self._pass_tokens = pass_tokens
        self.bytes = runner.bytes + bytes_of(head)

    def prepare(self, operation: str, requests: Sequence[Request]) -> PreparedTexts:
        """Check, word and tokenise every text in one call of the tokenizer."""
        if operation != "encode":
            raise RequestError(f"{self._spec.id} does not {operation}", param="model")
        texts: list[str] = []
        parts = [self._read(request, texts) for request in requests]
        poolings = {part.pooling for part in parts if part.error is None} or {self._folder.pooling}
        if len(poolings) > 1:  # options that change the forward pass are part of the batching key
            raise InferenceError("requests with different pooling do not share a micro-batch")
        ids = [encoding.ids or [0] for encoding in self._tokenizer.encode_batch_fast(texts)] if texts else []
        lengths = [len(one) for one in ids]
        passes = plan(lengths, pass_tokens=self._pass_tokens, padded=not self._encoder.layout.packed)
        counts = tuple(sum(lengths[part.rows]) for part in parts)
        return PreparedTexts(tuple(parts), poolings.pop(), ids, passes, counts)

    def run(self, prepared: PreparedTexts) -> torch.Tensor:
        """Vectors ``[N, D]`` of all texts, float32 on CPU, in the order of the micro-batch."""
        return vectors_of(self._encoder, self._head, prepared.ids, prepared.passes, prepared.pooling)

    def finish(self, prepared: PreparedTexts, raw: torch.Tensor) -> list[bytes | FarmError]:
        """Normalise and write each request's vectors as it asked for them."""
        unit = torch.nn.functional.normalize(raw, dim=-1).numpy() if len(raw) else raw.numpy()
        plain = raw.numpy()
        finite = torch.isfinite(raw).all(dim=-1).numpy() if len(raw) else None
        answers: list[bytes | FarmError] = []
        for part in prepared.parts:
            if part.error is not None:
                answers.append(part.error)
                continue
            if finite is not None and not finite[part.rows].all():
                answers.append(InferenceError(f"{self._spec.id} gave numbers that are not finite for this request"))
                continue
            wanted = part.request.options.get("normalize")
            rows = unit if (self._folder.normalize if wanted is None else wanted) else plain
            found = _cut(rows[part.rows], part.request.options.get("dimensions"), is_unit=rows is unit)
            answers.append(results.dense_items(part.request.items, found, _output_dtype(part.request)))
        return answers

    @property
    def packed_bytes(self) -> int:
        """Bytes that packed weights take beside the others."""
        return linears.packed_bytes(self._encoder.module)

    def pack(self) -> bool:
        """Compute with packed weights from now on, if that is quicker here."""
        return linears.pack(self._encoder.module)

    @property
    def module(self) -> torch.nn.Module:
        """The encoder; the layers after the pooling take no adapters."""
        return self._encoder.module

    def on(self, module: torch.nn.Module) -> "DenseModel":
        """One that encodes with another module."""
        from workers.host.adapted_encoder import with_adapters

        return like(self, _encoder=with_adapters(self._encoder, module))

    def close(self) -> None:
        """Let the weights go and keep the skeleton."""
        super().close()
        self._encoder = None  # type: ignore[assignment]  # it runs no more
        self._opened.close()

    def _read(self, request: Request, texts: list[str]) -> _Texts:
        """Append a request's texts, worded; one that cannot be read gets its error alone."""
        start = len(texts)
        try:
            self._check(request)
            texts += self._worded(request)
        except RequestError as error:
            del texts[start:]
            return _Texts(request, slice(start, start), error=error)
        pooling = request.options.get("pooling") or self._folder.pooling
        return _Texts(request, slice(start, len(texts)), pooling)

    def _check(self, request: Request) -> None:
        unknown = [one for one in request.output_types or () if one not in self._spec.outputs]
        if unknown:
            raise RequestError(
                f"{self._spec.id} has no output {unknown[0]!r}; it has {', '.join(self._spec.outputs)}",
                param="params.output_types",
            )
        if not isinstance(request.options.get("normalize", None), (bool, type(None))):
            raise RequestError("normalize is true or false", param="params.options.normalize")
        if request.options.get("pooling") not in (None, *POOLINGS):
            raise RequestError(f"pooling is one of {', '.join(POOLINGS)}", param="params.options.pooling")
        results.check_output_dtype(_output_dtype(request))

    def _worded(self, request: Request) -> list[str]:
        word = wording(request, self._spec, self._folder)
        errors: dict[int, RequestError] = {}
        found: list[str] = []
        for place, item in enumerate(request.items):
            text = item.get("text") if isinstance(item, dict) else item
            if isinstance(text, str):
                text = word(text)
                found.append(text.lower() if self._folder.lower_case else text)
            else:
                errors[place] = RequestError("an item has a text, as a string", param=f"items[{place}].text")
        if errors:
            raise results.item_errors(errors)
        return found


def _cut(rows: npt.NDArray[np.float32], width: Any, *, is_unit: bool) -> npt.NDArray[np.float32]:
    """Rows cut to their first numbers, as Matryoshka models are trained to be; of length one again if they were."""
    if not isinstance(width, int) or width >= rows.shape[1]:
        return rows
    cut = rows[:, :width]
    if not is_unit:
        return cut
    lengths: npt.NDArray[np.float32] = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(cut / np.maximum(lengths, np.float32(1e-12)), dtype=np.float32)


class DenseFamily:
    """Loads dense encoders, and remembers of each folder what it costs time to find out."""

    def __init__(self) -> None:
        self._kept = Recent(self._read)
        self._openings = Openings()
        self._tokenizers = SharedTokenizers()

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """Device bytes, as far as the weight files tell."""
        place = read_folder(files, spec).transformer
        return estimate_bytes(self._kept, spec, files, place.glob("*.safetensors"))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> DenseModel:
        """Load the model of a folder; the first time also find out how it runs best."""
        kept = self._kept.recall(spec, files)
        head = _head(kept.folder).to(device.name)

        def run(module: torch.nn.Module, layout: Layout, texts: Sequence[str]) -> torch.Tensor:
            ids = [encoding.ids for encoding in kept.tokenizer.encode_batch_fast(list(texts))]
            passes = plan([len(one) for one in ids], pass_tokens=device.pass_tokens, padded=not layout.packed)
            return vectors_of(encoder(module, layout, device.name), head, ids, passes, kept.folder.pooling)

        opened, layout = self._openings.open(Opening(spec, files, kept.folder.transformer, run), kept, device)
        runner = encoder(opened.module, layout, device.name)
        return DenseModel(spec, kept, opened, runner, head, pass_tokens=pass_budget(spec, device))

    def _read(self, spec: ModelSpec, files: Path) -> _Kept:
        folder = read_folder(files, spec)
        longest = longest_text(folder.transformer, folder.max_length)
        return _Kept(folder, self._tokenizers.of(folder.transformer, longest))


def vectors_of(
    runner: Encoder, head: torch.nn.Module, ids: Sequence[Sequence[int]], passes: Sequence[Pass], pooling: str
) -> torch.Tensor:
    """Pooled vectors ``[N, D]`` of tokenised texts, float32 on CPU, in their order; not normalised."""
    found: list[torch.Tensor] = []
    order: list[int] = []
    with torch.inference_mode():
        for one in passes:
            found += [_pool(states, pooling) for states in runner.hidden(ids, one)]
            order += one.rows
        if not found:
            return torch.empty(0, 0)
        rows = head(torch.cat(found)).cpu()
        ordered = torch.empty_like(rows)
        ordered[torch.tensor(order)] = rows
    return ordered


def _head(folder: Folder) -> torch.nn.Module:
    """The linear layers after the pooling, in float32."""
    layers: list[torch.nn.Module] = []
    for path in folder.dense:
        config = _dense_config(path)
        activation = LINEAR_ACTIVATIONS.get(str(config.get("activation_function", "")).rpartition(".")[2])
        if activation is None:
            raise refusal(f"the activation {config.get('activation_function')!r} of its dense layer is not known")
        linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        weights = load_file(path / "model.safetensors")
        linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
        layers += [linear, activation()]
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


def _dense_config(path: Path) -> dict[str, Any]:
    """The settings of one linear layer; a refusal where it is not there as safetensors."""
    try:
        config = msgspec.json.decode((path / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise refusal(f"the config.json of its dense layer {path.name} cannot be read ({error})") from error
    if not (path / "model.safetensors").exists():
        raise refusal(f"its dense layer {path.name} holds no safetensors weights; other formats are not loaded")
    return config


def _pool(states: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text from ``[count, length, width]``, in float32: every token is a real one."""
    match pooling:
        case "cls":
            return states[:, 0].float()
        case "last":
            return states[:, -1].float()
        case "max":
            return states.amax(dim=1).float()
        case "mean_sqrt_len":
            return states.float().sum(dim=1) / math.sqrt(states.shape[1])
        case _:
            return states.float().mean(dim=1)


def _output_dtype(request: Request) -> str:
    wanted = request.options.get("output_dtype", request.output_dtype)
    return wanted if isinstance(wanted, str) else str(wanted)
