"""The kinds of models there are, and what each can do. ``workers.host.families`` has the code that runs them."""

from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from config_db.spec import Input, ModelSpec, Operation, Output


class Family(msgspec.Struct, frozen=True):
    """One kind of model: what its models can do, give and take.

    ``pairs_labels``: they read a text once for each label, and not once with all.
    """

    operations: tuple[Operation, ...]
    outputs: tuple[Output, ...]
    inputs: tuple[Input, ...] = ("text",)
    pairs_labels: bool = False


FAMILIES: Final[Mapping[str, Family]] = {
    "dense": Family(("encode",), ("dense",)),
    "sparse": Family(("encode",), ("sparse",)),
    "multivector": Family(("encode", "score"), ("multivector",)),
    "bge-m3": Family(("encode", "score"), ("dense", "sparse", "multivector")),
    "cross-encoder": Family(("score",), ("score",)),
    "causal-reranker": Family(("score",), ("score",)),
    "token-classification": Family(("extract",), ("json",)),
    "gliner": Family(("extract",), ("json",)),
    "gliner2": Family(("extract",), ("json",)),
    "gliclass": Family(("extract",), ("json",)),
    "nli": Family(("extract",), ("json",), pairs_labels=True),
    "clip": Family(("encode",), ("dense",), ("text", "image")),
    "siglip": Family(("encode",), ("dense",), ("text", "image")),
}


ADAPTABLE: Final = frozenset(
    (
        "dense",
        "sparse",
        "multivector",
        "bge-m3",
        "cross-encoder",
        "causal-reranker",
        "token-classification",
        "nli",
    )
)
"""Families whose models take adapters."""


def takes_adapters(family: str) -> bool:
    """Whether adapters may be named for models of a family; the host of a family of the operator's own decides."""
    return family in ADAPTABLE or family not in FAMILIES


def in_vain(spec: ModelSpec) -> list[str]:
    """A warning for what a model's spec says and its family cannot use."""
    if not spec.adapters or takes_adapters(spec.family):
        return []
    return [f"adapters: models of the family `{spec.family}` take none, so requests that name one are refused"]


def why_unsupported(spec: ModelSpec, extra: Collection[str] | None = None) -> str | None:
    """Why this release cannot serve a model; None if it can.

    Args:
        spec: the model.
        extra: families of the operator's own; None: whatever is not known here is taken to be one.
    """
    if spec.unsupported is not None:
        return spec.unsupported
    is_known = extra is None or spec.family in extra or spec.family in FAMILIES
    return None if is_known else f"there is no family `{spec.family}`"
