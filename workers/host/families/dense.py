"""Text encoders with one vector a text: any sentence-transformers folder or plain transformers encoder.

The first load of a folder goes through transformers and finds, by comparing with a plain padded float32 run, how it
may be run: side by side without padding, and in which precision. What was found is kept, with the tokenizer and a
skeleton of the module, so that a model that was evicted comes back in milliseconds.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from common.errors import FarmError, InferenceError, RequestError
from common.logs import get_logger
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host import devices, precision
from workers.host.encoder import (
    Encoder,
    Layout,
    Skeletons,
    attention_window,
    cast,
    encoder,
    hang_in,
    layouts,
    load_module,
    plain_layout,
    read_weights,
)
from workers.host.families import results
from workers.host.families.dense_folder import POOLINGS, Folder, read_folder, refusal
from workers.host.families.dense_prompts import wording
from workers.host.families.protocol import Device
from workers.host.packing import Pass, plan

log = get_logger("host")

KEPT_FOLDERS: Final = 256
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
class _Verdict:
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
    verdict: _Verdict | None = None


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
            dtype = _output_dtype(part.request)
            answers.append(results.dense_items(part.request.items, rows[part.rows], dtype))
        return answers

    def close(self) -> None:
        """Let the weights go and keep the skeleton."""
        module, self._encoder = self._encoder.module, None  # type: ignore[assignment]  # a closed model runs no more
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


class DenseFamily:
    """Loads dense encoders, and remembers of each folder what it costs time to find out."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._skeletons = Skeletons()

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """The size of the weight files, halved where the model is known to run in half precision."""
        folder = read_folder(files, spec)
        size = sum(path.stat().st_size for path in folder.transformer.glob("*.safetensors"))
        kept = self._kept.get(_key(spec, files))
        halved = spec.precision in ("bfloat16", "float16") or (
            kept is not None and kept.verdict is not None and kept.verdict.precision != "float32"
        )
        return size // 2 if halved else size

    def load(self, spec: ModelSpec, files: Path, device: Device) -> DenseModel:
        """Load the model of a folder; the first time also find out how it runs best."""
        kept = self._recall(spec, files)
        head = _head(kept.folder)
        most = min(device.pass_tokens, CPU_PASS_TOKENS) if device.kind == "cpu" else device.pass_tokens
        budget = min(spec.limits.max_batch_tokens or most, most)

        def model(runner: Encoder) -> DenseModel:
            return DenseModel(spec, kept, runner, head.to(device.name), pass_tokens=budget, skeletons=self._skeletons)

        module = self._revive(kept) if kept.verdict is not None else None
        if module is not None and kept.verdict is not None:
            return model(encoder(module, kept.verdict.layout, device.name))
        module = load_module(kept.folder.transformer)
        kept.verdict = _Trial(spec, kept, device, model).judge(module)
        dtype = precision.DTYPES[kept.verdict.precision]
        return model(encoder(cast(module, dtype), kept.verdict.layout, device.name))

    def _recall(self, spec: ModelSpec, files: Path) -> _Kept:
        key = _key(spec, files)
        kept = self._kept.get(key)
        if kept is None:
            folder = read_folder(files, spec)
            kept = self._kept[key] = _Kept(folder, _tokenizer(folder))
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT_FOLDERS:
            self._kept.popitem(last=False)
        return kept

    def _revive(self, kept: _Kept) -> torch.nn.Module | None:
        """Hang the mapped weights into a kept skeleton; None where there is none or they do not fit."""
        assert kept.verdict is not None  # the caller has looked
        module = self._skeletons.take(kept.verdict.architecture)
        if module is None:
            return None
        dtype = precision.DTYPES[kept.verdict.precision]
        weights = read_weights(kept.folder.transformer, kept.verdict.prefix)
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        return module if hang_in(module, weights) else None


class _Trial:
    """The first run of a folder: tries layouts and precisions against a plain padded float32 run."""

    def __init__(self, spec: ModelSpec, kept: _Kept, device: Device, model: Any) -> None:
        self._spec = spec
        self._kept = kept
        self._device = device
        self._model = model
        self._ids: list[list[int]] = []

    def judge(self, module: torch.nn.Module) -> _Verdict:
        """The quickest layout and precision whose vectors are those of the plain run."""
        texts = precision.check_texts(attention_window(module))
        self._ids = [encoding.ids for encoding in self._kept.tokenizer.encode_batch_fast(texts)]
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
        return _Verdict(found, chosen, _architecture(module, chosen), prefix)

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


def _key(spec: ModelSpec, files: Path) -> tuple[str, str]:
    """Names a folder's content, as far as its files' sizes and dates tell, as this spec reads it."""
    stamp = hashlib.sha256(str(files).encode())
    for path in sorted(files.rglob("*")):
        if path.is_file():
            found = path.stat()
            stamp.update(f"{path.name}:{found.st_size}:{found.st_mtime_ns}".encode())
    return spec.digest, stamp.hexdigest()


def _architecture(module: torch.nn.Module, chosen: str) -> str:
    """Equal for modules that differ in their weights alone."""
    config: Any = module.config
    shape = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return f"{type(module).__name__}:{chosen}:{hashlib.sha256(msgspec.json.encode(shape, enc_hook=str)).hexdigest()}"


def _tokenizer(folder: Folder) -> Tokenizer:
    """The folder's fast tokenizer, without padding, truncating to the model's length."""
    path = folder.transformer / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        slow: Any = AutoTokenizer.from_pretrained(folder.transformer, local_files_only=True, trust_remote_code=False)
        if not getattr(slow, "is_fast", False):
            raise refusal("it has no fast tokenizer (tokenizer.json)")
        tokenizer = slow.backend_tokenizer
    tokenizer.no_padding()
    longest = _longest(folder)
    if longest is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(longest)
    return tokenizer


def _longest(folder: Folder) -> int | None:
    """The most tokens of one text: what the folder says, within the positions the encoder has."""
    try:
        config = msgspec.json.decode((folder.transformer / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise refusal(f"its config.json cannot be read ({error})") from error
    positions = config.get("max_position_embeddings")
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions = positions and positions - int(config.get("pad_token_id") or 1) - 1
    known = [one for one in (folder.max_length, positions) if isinstance(one, int) and one > 0]
    return min(known) if known else None


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
