"""The encoder inside a model of another library: only an architecture that transformers itself has.

The libraries of extraction build their encoder with remote code allowed, so its config is looked at before they do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.models.auto import CONFIG_MAPPING

from workers.host.families.dense_folder import refusal
from workers.weights.manifest import ENCODERS


def check_encoder(config: Any) -> None:
    """A refusal unless the config of an encoder names an architecture of transformers and no code of its own."""
    if not isinstance(config, Mapping):
        raise refusal("its files do not say what its encoder is")
    if config.get("auto_map"):
        raise refusal("its encoder needs code of its own repository (auto_map), which is not run")
    if config.get("model_type") not in CONFIG_MAPPING:
        raise refusal(f"its encoder is of type {config.get('model_type')!r}, which transformers does not have")


def encoder_folder(files: Path, repository: Any) -> Path:
    """Where config and tokenizer of an encoder lie that a model only names: with its files, or in the Hub cache.

    Raises:
        ModelLoadError: neither; nothing is fetched that no revision pins.
    """
    if not _is_repository(repository):
        raise refusal(f"its files leave encoder and tokenizer to {repository!r}, which is no repository of the Hub")
    beside = files / ENCODERS / str(repository)
    if beside.is_dir():
        return beside
    found = try_to_load_from_cache(str(repository), "config.json")
    if not isinstance(found, str):
        raise refusal(
            f"its files leave encoder and tokenizer to {repository!r}: name that repository and a revision of it under "
            "`source.encoders` of the model"
        )
    return Path(found).parent


def most_positions(config: Any) -> int | None:
    """The most tokens an encoder has positions for; None if it counts distances only."""
    if getattr(config, "position_biased_input", True) is False:  # DeBERTa, as of its third version
        return None
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _is_repository(name: Any) -> bool:
    return isinstance(name, str) and name.count("/") <= 1 and not name.startswith((".", "/")) and ".." not in name
