"""Loading what transformers calls a model with a head: an encoder and the layer that reads it, and its tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from config_db.spec import ModelSpec, WeightsFormat
from workers.host.encoder import cast
from workers.host.families.dense_folder import refusal
from workers.host.families.protocol import Device
from workers.host.families.text_folder import longest_text
from workers.host.precision import DTYPES
from workers.weights.manifest import SAFE

_UNBOUNDED = 1_000_000
"""Tokenizers that know no limit name a huge one."""


@dataclass(frozen=True, slots=True)
class Head:
    """A loaded model on its device, its fast tokenizer, and the most tokens it takes."""

    module: Any
    tokenizer: Any
    longest: int | None


def load_head(auto: Any, spec: ModelSpec, files: Path, device: Device) -> Head:
    """Load a folder through one of transformers' auto classes, without running code from it.

    Raises:
        ModelLoadError: no safetensors, weights that do not cover the model, or no fast tokenizer.
    """
    check_safetensors(files)
    module, told = auto.from_pretrained(
        files,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    check_covered(told["missing_keys"])
    tokenizer = load_fast_tokenizer(files)
    wanted = [one for one in (spec.max_length, tokenizer.model_max_length) if one and one < _UNBOUNDED]
    longest = longest_text(files, min(wanted) if wanted else None)
    return Head(settle(module, spec, device), tokenizer, longest)


def load_fast_tokenizer(files: Path) -> Any:
    """The folder's fast tokenizer, as transformers wraps it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(files, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise refusal("it has no fast tokenizer (tokenizer.json)")
    return tokenizer


def settle(module: Any, spec: ModelSpec, device: Device) -> Any:
    """A module as it is served: frozen, in the precision its spec names, on its device.

    ``auto`` is float32: what an extractor finds is cut off at a threshold, so that rounding shows as an entity more
    or less.
    """
    module.requires_grad_(requires_grad=False)
    if spec.precision != "auto":
        cast(module, DTYPES[spec.precision])
    return module.eval().to(device.name)


def weights_bytes(spec: ModelSpec, files: Path) -> int:
    """The size of a folder's weight files, halved where the spec asks for half precision."""
    size = sum(path.stat().st_size for path in files.iterdir() if path.suffix in _suffixes(spec.trust.formats))
    return size // 2 if spec.precision in ("bfloat16", "float16") else size


def check_safetensors(files: Path, formats: Sequence[WeightsFormat] = SAFE) -> None:
    """A refusal if there are no weights in the one format that cannot run code, or another that the spec trusts."""
    if not any(path.suffix in _suffixes(formats) for path in files.iterdir()):
        raise refusal("its folder holds no safetensors weights; other formats can run code and are not loaded")


def _suffixes(formats: Sequence[WeightsFormat]) -> tuple[str, ...]:
    return (".safetensors", ".bin") if "pickle" in formats else (".safetensors",)


def check_covered(missing: Any) -> None:
    """A refusal if weights are missing, which a library would leave random."""
    if missing:
        raise refusal(f"its files lack {len(missing)} of its weights, such as {min(missing)}")
