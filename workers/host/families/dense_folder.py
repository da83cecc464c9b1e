"""How a model's own folder wants to be read: pooling, normalisation, prompts, length. No torch.

A folder is a sentence-transformers model (``modules.json``) or a plain transformers encoder (``config.json`` alone,
which means mean pooling and no normalisation, as sentence-transformers reads it). What the spec says wins over files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from common.errors import ModelLoadError
from config_db.spec import ModelSpec

POOLINGS: Final = ("mean", "cls", "max", "last", "mean_sqrt_len")
_OLD_NAMES: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_NEW_NAMES: Final = {
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}
UNBOUNDED: Final = 1_000_000
"""Tokenizers that know no limit name a huge one."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What the files, and over them the spec, say.

    ``transformer`` holds config.json and the weights. ``dense`` lists folders of linear layers after the pooling.
    ``prompts`` are prefixes by name.
    """

    transformer: Path
    pooling: str = "mean"
    normalize: bool = False
    lower_case: bool = False
    max_length: int | None = None
    dense: tuple[Path, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def prompt(self, name: str) -> str:
        """The prefix of a kind of text, '' if the model has none for it."""
        return self.prompts.get(name, "")


def read_folder(files: Path, spec: ModelSpec) -> Folder:
    """Read the folder of a model.

    Raises:
        ModelLoadError: it asks for something this family does not do; better none than wrong vectors.
    """
    modules = read_json(files / "modules.json")
    folder = _read_modules(files, modules) if isinstance(modules, list) else Folder(transformer=files)
    folder = with_settings(files, folder)
    return replace(
        folder,
        pooling=spec.pooling or folder.pooling,
        normalize=folder.normalize if spec.normalize is None else spec.normalize,
        max_length=spec.max_length or folder.max_length,
        prompts={**folder.prompts, **spec.prompts},
        default_prompt=spec.default_prompt or folder.default_prompt,
    )


def _read_modules(files: Path, modules: list[Mapping[str, Any]]) -> Folder:
    folder = Folder(transformer=files)
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], files / str(module.get("path", ""))
        if kind == "Transformer":
            folder = replace(folder, transformer=path)
        elif kind == "Pooling":
            folder = replace(folder, pooling=_pooling(path))
        elif kind == "Normalize":
            folder = replace(folder, normalize=True)
        elif kind == "Dense":
            folder = replace(folder, dense=(*folder.dense, path))
        else:
            raise refusal(f"its module {kind!r} is none that the dense family runs")
    return folder


def _pooling(path: Path) -> str:
    config = read_json(path / "config.json") or {}
    if config.get("include_prompt", True) is False:
        raise refusal("its pooling leaves the prompt out, which the dense family does not do")
    named = config.get("pooling_mode")
    modes = [_NEW_NAMES.get(named, named)] if isinstance(named, str) else []
    modes = modes or [name for key, name in _OLD_NAMES.items() if config.get(key)]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise refusal(f"its pooling {modes or config} is none of {', '.join(POOLINGS)}")
    return str(modes[0])


def with_settings(files: Path, folder: Folder) -> Folder:
    """What the small JSON files say of lengths, letter case and prompts."""
    own = read_json(folder.transformer / "sentence_bert_config.json") or {}
    tokenizer = read_json(folder.transformer / "tokenizer_config.json") or {}
    shared = read_json(files / "config_sentence_transformers.json") or {}
    longest = own.get("max_seq_length") or tokenizer.get("model_max_length")
    return replace(
        folder,
        lower_case=bool(own.get("do_lower_case", False)),
        max_length=int(longest) if isinstance(longest, (int, float)) and longest < UNBOUNDED else None,
        prompts={name: text for name, text in (shared.get("prompts") or {}).items() if text},
        default_prompt=shared.get("default_prompt_name"),
    )


def refusal(why: str) -> ModelLoadError:
    """The error for a folder that cannot be served as it wants to be."""
    return ModelLoadError(f"the model cannot be loaded: {why}", details={"error_class": "CONFIG", "permanent": True})


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is none; a refusal if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise refusal(f"{path.name} is not JSON ({error})") from error
