"""The batching key: requests that share it may share a forward pass."""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tasks.names import Operation

_EXTRACTORS_OWN: Final = frozenset(
    {"threshold", "relation_threshold", "flat_ner", "multi_label", "aggregation_strategy"}
    | {"hypothesis_template", "overflow_policy", "stride"}
)
FORWARD_FREE: Final = _EXTRACTORS_OWN | frozenset(
    (
        "is_query",
        "keep_alive",
        "instruction",
        "normalize",
        "output_dtype",
        "profile",
        "lora",
        "lora_id",
        "muvera",
        "max_active_dims",
    )
)
"""Options that change no forward pass: requests that differ in them may share one."""


def shared_key(key: str) -> str:
    """The key of what may share a micro-batch, whatever adapter it has: hosts keep different adapters apart.

    Requests without an adapter stay by themselves.
    """
    parts = key.rsplit("|", 2)
    return key if len(parts) < 3 or not parts[1] else f"{parts[0]}|*|{parts[2]}"


def batch_key(model: str, spec: str, operation: Operation, adapter: str | None, options: Mapping[str, Any]) -> str:
    """Requests with equal keys may share a forward pass; a caller's words enter it as a digest only."""
    forward = {name: value for name, value in options.items() if name not in FORWARD_FREE} if options else None
    digest = ""
    if forward:
        digest = hashlib.sha256(msgspec.json.encode(forward, order="deterministic")).hexdigest()[:16]
    return f"{model}@{spec}|{operation}|{adapter or ''}|{digest}"
