"""Text encoders with one vector a text: any sentence-transformers folder or plain transformers encoder.

The first load of a folder goes through transformers and finds, by comparing with a plain padded float32 run, how it
may be run: side by side without padding, and in which precision. What was found is kept, with the tokenizer and a
skeleton of the module, so that a model that was evicted comes back in milliseconds.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import __version__ as transformers_version

from common.errors import FarmError, InferenceError, RequestError
from common.logs import get_logger
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host import devices, linears, precision
from workers.host.copies import Copies
from workers.host.encoder import (
    Encoder,
    Layout,
    Skeletons,
    attention_window,
    blank_module,
    cast,
    encoder,
    hang_in,
    has_own_buffers,
    layouts,
    load_module,
    plain_layout,
    read_weights,
)
from workers.host.families import results
from workers.host.families.dense_folder import POOLINGS, Folder, read_folder, refusal
from workers.host.families.dense_prompts import wording
from workers.host.families.flat_copies import find_copy
from workers.host.families.protocol import Device
from workers.host.families.shared_tokenizers import SharedTokenizers
from workers.host.families.text_folder import content_key, longest_text
from workers.host.flat import FlatWeights
from workers.host.packing import Pass, plan

if TYPE_CHECKING:
    from workers.host.rack import Rack

log = get_logger("host")

KEPT_FOLDERS: Final = 256
_NOT_SHAPE: Final = frozenset(("_name_or_path", "transformers_version", "torch_dtype", "dtype"))
EQUAL: Final = 0.9999
"""Cosine between a packed and a padded run that says they compute the same thing."""
CPU_PASS_TOKENS: Final = 1024
"""A larger pass leaves the cache of a core: at 2048 tokens all-MiniLM-L6-v2 gave 5 to 10 % less."""
LINEAR_ACTIVATIONS: Final = {
    "Identity": torch.nn.Identity,
    "Tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
    "GELU": torch.nn.GELU,
    "Sigmoid": torch.nn.Sigmoid,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the first load of a folder found out."""

    layout: Layout
    precision: str
    architecture: str
    prefix: str


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

    requests: tuple[_Texts, ...]
    pooling: str
    ids: list[list[int]]
    passes: list[Pass]
    request_tokens: tuple[int, ...]


class DenseModel:
    """One loaded encoder."""

    def __init__(
        self,
        spec: ModelSpec,
        kept: _Kept,
        runner: Encoder,
        head: torch.nn.Module,
        *,
        pass_tokens: int,
        skeletons: Skeletons,
    ) -> None:
        self._spec = spec
        self._folder = kept.folder
        self._tokenizer = kept.tokenizer
        self._encoder = runner
        self._head = head
        self._pass_tokens = pass_tokens
        self._skeletons = skeletons
        self._closing = Lock()
        self._architecture = kept.verdict.architecture if kept.verdict else ""
        self.bytes = runner.bytes + sum(one.numel() * one.element_size() for one in head.parameters())

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
        return self.vectors(prepared.ids, prepared.passes, prepared.pooling)

    def vectors(self, ids: Sequence[Sequence[int]], passes: Sequence[Pass], pooling: str) -> torch.Tensor:
        """Pooled vectors of tokenised texts, not normalised."""
        found: list[torch.Tensor] = []
        order: list[int] = []
        with torch.inference_mode():
            for one in passes:
                found += [_pool(states, pooling) for states in self._encoder.hidden(ids, one)]
                order += one.rows
            if not found:
                return torch.empty(0, 0)
            rows = self._head(torch.cat(found)).cpu()
            ordered = torch.empty_like(rows)
            ordered[torch.tensor(order)] = rows
        return ordered

    def finish(self, prepared: PreparedTexts, raw: torch.Tensor) -> list[bytes | FarmError]:
        """Normalise and write each request's vectors as it asked for them."""
        unit = torch.nn.functional.normalize(raw, dim=-1).numpy() if len(raw) else raw.numpy()
        plain = raw.numpy()
        finite = torch.isfinite(raw).all(dim=-1).numpy() if len(raw) else None
        answers: list[bytes | FarmError] = []
        for part in prepared.requests:
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
    def is_on_cpu(self) -> bool:
        """Whether its weights are in host memory."""
        return self._encoder is not None and self._encoder.device == "cpu"

    def weights(self) -> dict[str, torch.Tensor]:
        """Its parameters as they run, by name."""
        return dict(self._encoder.module.named_parameters(remove_duplicate=False))

    def adopt(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use the same numbers from elsewhere, also while it runs: each tensor is exchanged by one store."""
        with self._closing:
            if self._encoder is not None:
                hang_in(self._encoder.module, weights)

    @property
    def packed_bytes(self) -> int:
        """Bytes that packed weights take beside the others."""
        return linears.packed_bytes(self._encoder.module)

    def pack(self) -> bool:
        """Compute with packed weights from now on, if that is quicker here."""
        return linears.pack(self._encoder.module)

    @cached_property
    def rack(self) -> "Rack":
        """What its adapters hang on; peft is imported with the first."""
        from workers.host.families.dense_adapted import AdaptedDense
        from workers.host.rack import Rack

        return Rack(self._encoder.module, partial(AdaptedDense, self), mixes=True)

    def close(self) -> None:
        """Let the weights go and keep the skeleton."""
        if "rack" in self.__dict__:
            self.rack.close()
        with self._closing:
            module, self._encoder = self._encoder.module, None  # type: ignore[assignment]  # it runs no more
        linears.unpack(module)
        self._skeletons.give_back(self._architecture, module)

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
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._skeletons = Skeletons()
        self._layouts: dict[str, Layout] = {}
        self._tokenizers = SharedTokenizers()

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """The size of the weight files, halved where the model runs in half precision, as far as is known."""
        folder = read_folder(files, spec)
        size = sum(path.stat().st_size for path in folder.transformer.glob("*.safetensors"))
        kept = self._kept.get(content_key(spec, files))
        if kept is not None and kept.verdict is not None:
            found = kept.verdict.precision
        else:
            found = precision.quick(Device()) if spec.precision == "auto" else spec.precision
        return size // 2 if found != "float32" else size

    def load(self, spec: ModelSpec, files: Path, device: Device) -> DenseModel:
        """Load the model of a folder; the first time also find out how it runs best."""
        key = content_key(spec, files)
        kept = self._recall(key, spec, files)
        name = _copy_name(key, device)
        flat = self._flat(name, kept, device, keep=spec.placement.tier == "memory")
        module = self._revive(kept, flat) if kept.verdict is not None else self._judge_alike(spec, kept, device)
        is_kept = flat is not None and module is not None
        module = module if module is not None else self._judge(spec, kept, device)
        assert kept.verdict is not None  # one of the three has found it
        self._layouts.setdefault(kept.verdict.architecture, kept.verdict.layout)
        model = self._model(spec, kept, device, encoder(module, kept.verdict.layout, device.name))
        if device.copies is not None and not is_kept:
            self._keep(device.copies, name, kept.verdict, model)
        return model

    def _model(self, spec: ModelSpec, kept: _Kept, device: Device, runner: Encoder) -> DenseModel:
        head = _head(kept.folder).to(device.name)
        most = min(device.pass_tokens, CPU_PASS_TOKENS) if device.kind == "cpu" else device.pass_tokens
        budget = min(spec.limits.max_batch_tokens or most, most)
        return DenseModel(spec, kept, runner, head, pass_tokens=budget, skeletons=self._skeletons)

    def _recall(self, key: tuple[str, str], spec: ModelSpec, files: Path) -> _Kept:
        kept = self._kept.get(key)
        if kept is None:
            folder = read_folder(files, spec)
            longest = longest_text(folder.transformer, folder.max_length)
            kept = self._kept[key] = _Kept(folder, self._tokenizers.of(folder.transformer, longest))
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT_FOLDERS:
            self._kept.popitem(last=False)
        return kept

    def _flat(self, name: str, kept: _Kept, device: Device, *, keep: bool) -> FlatWeights | None:
        """The copy that was kept, on the device, and with it what was found out when it was made."""
        found = find_copy(name, device, keep=keep)
        if found is not None:
            kept.verdict = kept.verdict or msgspec.json.decode(found.note, type=Verdict)
        return found

    def _revive(self, kept: _Kept, flat: FlatWeights | None) -> torch.nn.Module | None:
        """Hang kept or mapped weights into a skeleton; None where they do not fit."""
        assert kept.verdict is not None  # the caller has looked
        if not kept.verdict.architecture:
            return None
        module = self._skeletons.take(kept.verdict.architecture) or blank_module(kept.folder.transformer)
        if flat is not None and flat.bytes:
            return module if hang_in(module, flat.tensors()) else None
        weights = read_weights(kept.folder.transformer, kept.verdict.prefix)
        return module if hang_in(module, _in(precision.DTYPES[kept.verdict.precision], weights)) else None

    def _judge_alike(self, spec: ModelSpec, kept: _Kept, device: Device) -> torch.nn.Module | None:
        """Judge a folder whose architecture was judged with other weights: only the precision depends on those."""
        architecture = _architecture(kept.folder)
        layout = self._layouts.get(architecture)
        module = self._skeletons.take(architecture) if layout is not None else None
        if layout is None or module is None:
            return None
        prefix = str(getattr(module, "base_model_prefix", ""))
        if not hang_in(module, _in(torch.float32, read_weights(kept.folder.transformer, prefix))):
            return None
        trial = _Trial(spec, kept, device, lambda runner: self._model(spec, kept, device, runner))
        chosen = trial.precision_in(module, layout)
        kept.verdict = Verdict(layout, chosen, architecture, prefix)
        return cast(module, precision.DTYPES[chosen])

    def _judge(self, spec: ModelSpec, kept: _Kept, device: Device) -> torch.nn.Module:
        """Load through transformers and find out everything."""
        module = load_module(kept.folder.transformer)
        trial = _Trial(spec, kept, device, lambda runner: self._model(spec, kept, device, runner))
        kept.verdict = trial.judge(module)
        cast(module, precision.DTYPES[kept.verdict.precision])
        self._skeletons.learn(kept.verdict.architecture, module)
        return module

    def _keep(self, copies: Copies, name: str, verdict: Verdict, model: DenseModel) -> None:
        """Keep what was found out, and the weights where they were converted; the model then uses the mapped ones."""
        tensors = model.weights() if verdict.precision != "float32" else {}

        def adopt() -> None:
            found = copies.find(name) if tensors and model.is_on_cpu else None
            if found is not None:
                model.adopt(found.tensors())

        copies.keep_soon(name, tensors, msgspec.json.encode(verdict).decode(), adopt)


class _Trial:
    """The first run of a folder: tries layouts and precisions against a plain padded float32 run."""

    def __init__(self, spec: ModelSpec, kept: _Kept, device: Device, model: Any) -> None:
        self._spec = spec
        self._kept = kept
        self._device = device
        self._model = model
        self._ids: list[list[int]] = []

    def precision_in(self, module: torch.nn.Module, layout: Layout) -> str:
        """The quickest precision whose vectors are those of a float32 run, in a layout known to be right."""
        self._tokenise(precision.FEW_CHECK_TEXTS)
        wanted = precision.candidates(self._spec.precision, self._device)
        return wanted[0] if len(wanted) == 1 else self._precision(module, layout, self._vectors(module, layout))

    def judge(self, module: torch.nn.Module) -> Verdict:
        """The quickest layout and precision whose vectors are those of the plain run."""
        self._tokenise(precision.check_texts(attention_window(module)))
        padded = plain_layout(module)
        plain = self._vectors(module, padded)
        found = self._packed(module, plain) or padded
        chosen = self._precision(module, found, plain)
        log.info(
            "model_judged",
            model=self._spec.id,
            packed=found.packed,
            first_position=found.first_position,
            precision=chosen,
        )
        prefix = str(getattr(module, "base_model_prefix", ""))
        architecture = "" if has_own_buffers(module) else _architecture(self._kept.folder)
        return Verdict(found, chosen, architecture, prefix)

    def _tokenise(self, texts: Sequence[str]) -> None:
        self._ids = [encoding.ids for encoding in self._kept.tokenizer.encode_batch_fast(list(texts))]

    def _packed(self, module: torch.nn.Module, plain: torch.Tensor) -> Layout | None:
        """The packed layout that computes what the plain run does, if there is one."""
        cosines: list[float] = []
        for layout in layouts(module, self._device.kind):
            cosines.append(self._compare(module, layout, plain))
            if cosines[-1] >= EQUAL:
                return layout
        if cosines:
            log.info("padding_free_refused", model=self._spec.id, cosine=round(max(cosines), 6))
        return None

    def _precision(self, module: torch.nn.Module, layout: Layout, plain: torch.Tensor) -> str:
        *tried, last = precision.candidates(self._spec.precision, self._device)
        for name in tried:
            cosine = self._compare(cast(module, precision.DTYPES[name]), layout, plain)
            if cosine >= precision.SAME:
                return str(name)
            log.warning("precision_refused", model=self._spec.id, precision=name, cosine=round(cosine, 6))
            _restore_float32(module, self._kept.folder)
        return str(last)

    def _compare(self, module: torch.nn.Module, layout: Layout, plain: torch.Tensor) -> float:
        try:
            return precision.worst_cosine(self._vectors(module, layout), plain)
        except Exception as error:
            if devices.is_out_of_memory(error) or devices.is_device_lost(error):
                raise  # says nothing about the layout
            log.debug("layout_refused", model=self._spec.id, packed=layout.packed, error=repr(error)[:200])
            return -1.0

    def _vectors(self, module: torch.nn.Module, layout: Layout) -> torch.Tensor:
        passes = plan([len(one) for one in self._ids], pass_tokens=self._device.pass_tokens, padded=not layout.packed)
        model: DenseModel = self._model(encoder(module, layout, self._device.name))
        return model.vectors(self._ids, passes, self._kept.folder.pooling)


def _restore_float32(module: torch.nn.Module, folder: Folder) -> None:
    """Give a module its float32 weights back after a lower precision was refused."""
    cast(module, torch.float32)
    weights = load_module(folder.transformer).state_dict()
    module.load_state_dict(weights, strict=False)


def _copy_name(key: tuple[str, str], device: Device) -> str:
    """Names a copy by what it is made of and what decides how it comes out."""
    made_by = (*key, device.kind, torch.__version__, transformers_version, precision.quick(device))
    return hashlib.sha256(":".join(made_by).encode()).hexdigest()[:40]


def _in(dtype: torch.dtype, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _architecture(folder: Folder) -> str:
    """Equal for folders that differ in their weights alone."""
    try:
        config = msgspec.json.decode((folder.transformer / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise refusal(f"its config.json cannot be read ({error})") from error
    shape = {name: value for name, value in config.items() if name not in _NOT_SHAPE}
    return hashlib.sha256(msgspec.json.encode(shape, order="deterministic")).hexdigest()


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
