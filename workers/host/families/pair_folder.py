"""What the folder of a model that scores pairs says, and how its module is loaded. Reads no weights but for loading.

A folder is one of sentence-transformers' CrossEncoder (``modules.json``) or a plain one of transformers. What the spec
says wins over files.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer

from common.errors import RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host import precision
from workers.host.families.dense_folder import Folder, read_json, refusal, with_settings
from workers.host.families.protocol import Device

ACTIVATIONS: Final = {
    "Identity": torch.nn.Identity,
    "Sigmoid": torch.nn.Sigmoid,
    "Tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
}
_ITEM_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_HEADER_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class PairFolder:
    """What the files, and over them the spec, say.

    ``transformer`` holds config.json, which is ``config``, and the weights. ``modules`` are the kinds of what runs
    after it, with their settings. ``activation`` names what a logit goes through; ``prompt`` goes before each query.
    """

    transformer: Path
    config: Mapping[str, Any]
    modules: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    activation: str = "Sigmoid"
    lower_case: bool = False
    max_length: int | None = None
    prompt: str = ""


def read_pair_folder(files: Path, spec: ModelSpec) -> PairFolder:
    """Read the folder of a model.

    Raises:
        ModelLoadError: it cannot be read, or holds no safetensors.
    """
    modules = read_json(files / "modules.json") or []
    found = Folder(transformer=files)
    after: list[tuple[str, Mapping[str, Any]]] = []
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], files / str(module.get("path", ""))
        if kind == "Transformer":
            found = replace(found, transformer=path)
        else:
            after.append((kind, read_json(path / "config.json") or {}))
    found = with_settings(files, found)
    config = read_json(found.transformer / "config.json")
    if not isinstance(config, dict):
        raise refusal("it has no config.json")
    if not any(found.transformer.glob("*.safetensors")):
        raise refusal("its folder holds no safetensors weights; other formats can run code and are not loaded")
    default_prompt = spec.default_prompt or found.default_prompt
    return PairFolder(
        transformer=found.transformer,
        config=config,
        modules=tuple(after),
        activation=_activation(files, config),
        lower_case=found.lower_case,
        max_length=spec.max_length or found.max_length,
        prompt={**found.prompts, **spec.prompts}.get(default_prompt or "", ""),
    )


def library_tokenizer(folder: PairFolder) -> Any:
    """The tokenizer as transformers makes it: its class knows what a module is given, which its files need not say.

    Its ``backend_tokenizer`` neither pads nor truncates.
    """
    made: Any = AutoTokenizer.from_pretrained(folder.transformer, local_files_only=True, trust_remote_code=False)
    if not getattr(made, "is_fast", False):
        raise refusal("it has no fast tokenizer (tokenizer.json)")
    made.backend_tokenizer.no_padding()
    made.backend_tokenizer.no_truncation()
    return made


def instruction_of(request: Request, spec: ModelSpec) -> str | None:
    """The request's instruction, else the model's own; None if there is neither.

    Raises:
        RequestError: it is no text.
    """
    wanted = request.instruction or request.options.get("instruction")
    if not isinstance(wanted, str | None):
        raise RequestError("an instruction is a text", param="options.instruction")
    return wanted or spec.default_instruction


def choose_dtype(spec: ModelSpec, folder: PairFolder, device: Device) -> torch.dtype:
    """As the spec says; else on a GPU the format that the weights were published in, on CPU float32.

    A score is read as a number, often against a threshold, so none is rounded for speed that was not so published.
    """
    if spec.precision != "auto":
        return precision.DTYPES[spec.precision]
    published = str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32")
    return precision.DTYPES.get(published, torch.float32) if device.kind == "cuda" else torch.float32


def expected_dtype(spec: ModelSpec, folder: PairFolder) -> torch.dtype:
    """What ``choose_dtype`` is going to say in this host, whose device is open by now."""
    has_opened_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return choose_dtype(spec, folder, Device(kind="cuda" if has_opened_gpu else "cpu"))


def measure_weights(folder: PairFolder, dtype: torch.dtype) -> int:
    """Bytes that the weights take in a number format, told from the headers of their files."""
    return sum(_measure_file(path, dtype.itemsize) for path in folder.transformer.glob("*.safetensors"))


def _measure_file(path: Path, item_bytes: int) -> int:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        tensors = [told for name, told in header.items() if name != "__metadata__"]
        return sum(
            math.prod(told["shape"]) * (item_bytes if told["dtype"] in _FLOATS else _ITEM_BYTES[told["dtype"]])
            for told in tensors
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refusal(f"{path.name} is no whole safetensors file ({type(error).__name__}: {error})") from error


def load_whole(maker: Any, folder: PairFolder, dtype: torch.dtype) -> torch.nn.Module:
    """Load with a class of transformers, without running code from the folder.

    Raises:
        ModelLoadError: the files lack weights, which the class would make up at random.
    """
    module, told = maker.from_pretrained(
        folder.transformer,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing: Sequence[str] = sorted(told["missing_keys"])
    if missing:
        raise refusal(f"its weights lack {', '.join(missing[:3])}, which would be made up at random")
    return module.eval().requires_grad_(requires_grad=False)  # type: ignore[no-any-return]  # transformers is untyped


def _activation(files: Path, config: Mapping[str, Any]) -> str:
    """By name what a logit goes through, as CrossEncoder finds it."""
    shared = read_json(files / "config_sentence_transformers.json") or {}
    own = config.get("sentence_transformers") or {}
    said = (
        shared.get("activation_fn")
        or own.get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or "torch.nn.Sigmoid"
    )
    package, _, kind = str(said).rpartition(".")
    if not package.startswith("torch") or kind not in ACTIVATIONS:
        raise refusal(f"its activation {said!r} is none of {', '.join(ACTIVATIONS)}")
    return kind
