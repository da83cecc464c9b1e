"""Encoders that a model's files only name: their config and tokenizer lie in another repository, their weights here."""

from collections.abc import Collection, Mapping
from typing import Any, Final

_FIELDS: Final = (
    ("model_name", "encoder_config", "tokenizer_config.json"),
    ("labels_encoder", "labels_encoder_config", "labels_tokenizer/tokenizer_config.json"),
)
"""Of a gliner_config.json: what names an encoder, what holds its config, and a file that comes with its tokenizer."""


def encoders_named(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The fields of a gliner_config.json that name an encoder whose config or tokenizer the folder lacks.

    Args:
        config: its content.
        names: of the folder's files, parts joined by ``/``.
    """
    return [
        field
        for field, own_config, tokenizer in _FIELDS
        if config.get(field) is not None and (config.get(own_config) is None or tokenizer not in names)
    ]
