"""The files of an adapter, read and checked before anything is routed to it: a LoRA as peft saves it, safetensors only.

Owns what may stand in such a folder, and the words of a refusal. Hanging an adapter on its base is for ``rack``.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load

from common.errors import ModelLoadError

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
MAX_RANK: Final = 256
MAX_FILE_BYTES: Final = 2**30
_PREFIX: Final = "base_model.model."
_TENSOR: Final = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.(?P<kind>weight|bias)")
_PLAIN_PATTERN: Final = re.compile(r"\^?[\w.\\]+\$?")
"""Patterns that name modules; what repeats or chooses could keep a host busy for ever."""
_REFUSED: Final = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "modules_to_save": "whole modules in place of the base's (modules_to_save)",
    "trainable_token_indices": "tokens of its own (trainable_token_indices)",
    "target_parameters": "bare parameters (target_parameters)",
    "layer_replication": "layers run twice (layer_replication)",
    "megatron_config": "Megatron layers",
}
"""Fields of the config that ask for what is not plain LoRA, and what they ask for."""
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations after which the base's weights are no longer its own."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A checked adapter: its config, its tensors by the names they have in the file, and a digest of both files."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int]
    digest: str

    @staticmethod
    def module_of(tensor: str) -> str:
        """The module of the base that a tensor of this name belongs to."""
        return tensor.removeprefix(_PREFIX).partition(".lora_")[0]

    def lora_config(self) -> LoraConfig:
        """For peft: names exactly the modules that there are tensors for; ``peft`` works the scalings out."""
        given = self.config
        return LoraConfig(
            r=given["r"],
            lora_alpha=given.get("lora_alpha", 8),
            target_modules=list(self.ranks),
            rank_pattern=given.get("rank_pattern") or {},
            alpha_pattern=given.get("alpha_pattern") or {},
            use_rslora=bool(given.get("use_rslora")),
            lora_bias=bool(given.get("lora_bias")),
            init_lora_weights=False,
            inference_mode=True,
        )


def read_adapter(folder: Path, base: torch.nn.Module) -> AdapterFiles:
    """Read an adapter and check that it is whole, sound, and fits the base.

    Raises:
        ModelLoadError: it is not; says what is wrong with which tensor or field.
    """
    raw_config = _bytes(folder / CONFIG)
    config = _config(raw_config)
    raw_weights = _weights(folder)
    try:
        tensors = load(raw_weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise refusal(f"its {WEIGHTS} is cut off or damaged ({str(error)[:200]})") from error
    modules = _modules(tensors, has_bias=bool(config.get("lora_bias")))
    ranks = {name: _rank(name, halves, config, base) for name, halves in modules.items()}
    _check_targets(config.get("target_modules"), ranks)
    digest = hashlib.sha256(raw_config + b"\0" + raw_weights).hexdigest()[:16]
    return AdapterFiles(config, tensors, ranks, digest)


def refusal(why: str) -> ModelLoadError:
    """The error of an adapter that cannot be served as it is."""
    details = {"error_class": "CONFIG", "permanent": True}
    return ModelLoadError(f"the adapter cannot be loaded: {why}", details=details)


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise refusal(f"its {path.name} of {size:,} bytes is larger than {MAX_FILE_BYTES:,}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise refusal(f"its folder holds no {path.name}") from error
    except OSError as error:
        raise refusal(f"its {path.name} cannot be read ({error.strerror})") from error


def _weights(folder: Path) -> bytes:
    if not (folder / WEIGHTS).exists() and any(folder.glob("adapter_model.*")):
        raise refusal(f"its folder holds no {WEIGHTS}; other formats can run code and are not loaded")
    return _bytes(folder / WEIGHTS)


def _config(raw: bytes) -> dict[str, Any]:
    """The adapter's config, refused where it asks for more than plain LoRA."""
    try:
        config = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise refusal(f"its {CONFIG} is no JSON object ({error})") from error
    if config.get("peft_type") != "LORA":
        raise refusal(f"its {CONFIG} says peft_type {config.get('peft_type')!r}; only LORA is served")
    for field, what in _REFUSED.items():
        if config.get(field):
            raise refusal(f"it asks for {what}, which is not served")
    if config.get("bias") not in (None, "none"):
        raise refusal(f"bias {config['bias']!r} would change the base's own biases")
    _check_start(config.get("init_lora_weights"))
    _check_numbers(config)
    return config


def _check_start(start: object) -> None:
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise refusal(
            f"it was trained from init_lora_weights {start!r}, on a changed base; save it again as plain LoRA "
            "(peft: path_initial_model_for_weight_conversion)"
        )


def _check_numbers(config: Mapping[str, Any]) -> None:
    rank, alpha = config.get("r"), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise refusal(f"its {CONFIG} gives no rank: r is {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise refusal(f"its lora_alpha {alpha!r} is no number")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(isinstance(one, (int, float)) for one in patterns.values()):
            raise refusal(f"its {field} does not map modules to numbers")
        for pattern in patterns:
            if not _PLAIN_PATTERN.fullmatch(pattern):
                raise refusal(f"its {field} has the pattern {pattern[:100]!r}; only names of modules are read")


def _modules(tensors: Mapping[str, torch.Tensor], *, has_bias: bool) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each module: ``A``, ``B`` and perhaps ``bias``."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
        if match is None or (match["kind"] == "bias" and (match["half"] == "A" or not has_bias)):
            raise refusal(f"its tensor {name!r} is none of a plain LoRA")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise refusal(f"its tensor {name!r} holds numbers that are not finite")
        found[match["module"]]["bias" if match["kind"] == "bias" else match["half"]] = tensor
    if not found:
        raise refusal(f"its {WEIGHTS} holds no tensors")
    return found


def _rank(name: str, halves: Mapping[str, torch.Tensor], config: Mapping[str, Any], base: torch.nn.Module) -> int:
    """The rank of an adapted module, whose tensors fit the base and the config."""
    wanted = {"A", "B"} | ({"bias"} if config.get("lora_bias") else set())
    if missing := sorted(wanted - halves.keys()):
        raise refusal(f"of its module {name!r} the half {missing[0]} is missing")
    layer = _layer(name, base)
    if halves["A"].dim() != 2 or halves["B"].dim() != 2:
        raise refusal(f"the tensors of its module {name!r} are no matrices")
    rank = halves["A"].shape[0]
    if rank > MAX_RANK:
        raise refusal(f"its module {name!r} has rank {rank}; at most {MAX_RANK} is served")
    expected = {"A": (rank, layer.in_features), "B": (layer.out_features, rank), "bias": (layer.out_features,)}
    for half, tensor in halves.items():
        if tuple(tensor.shape) != expected[half]:
            raise refusal(
                f"the half {half} of its module {name!r} is {list(tensor.shape)}; the base wants {list(expected[half])}"
            )
    patterns = config.get("rank_pattern") or {}
    said = patterns.get(get_pattern_key(list(patterns), name), config["r"])
    if rank != said:
        raise refusal(f"its module {name!r} has rank {rank}, but its {CONFIG} says {said}")
    return rank


def _layer(name: str, base: torch.nn.Module) -> torch.nn.Linear:
    try:
        layer = base.get_submodule(name)
    except AttributeError as error:
        raise refusal(f"the base has no module {name!r} that takes adapters") from error
    if type(layer) is not torch.nn.Linear:
        raise refusal(f"the base's module {name!r} is a {type(layer).__name__}; only linear layers are adapted")
    return layer


def _check_targets(targets: object, modules: Collection[str]) -> None:
    """Every module that the config names must have tensors; a pattern is left to who wrote it."""
    if not isinstance(targets, list):
        return
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise refusal(f"its {CONFIG} names the module {str(target)[:100]!r}, for which it holds no weights")
