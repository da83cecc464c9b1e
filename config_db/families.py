"""The kinds of models there are, and what each can do. ``workers.host.families`` has the code that runs them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from config_db.field_paths import below
from config_db.spec import Input, ModelSpec, Operation, Output


class Family(msgspec.Struct, frozen=True):
    """One kind of model: what its models can do, give and take.

    ``pairs_labels``: they read a text once for each label, and not once with all.
    """

    operations: tuple[Operation, ...]
    outputs: tuple[Output, ...]
    inputs: tuple[Input, ...] = ("text",)
    pairs_labels: bool = False

    @property
    def does(self) -> dict[str, tuple[str, ...]]:
        """What it does, by the field of a spec that may name less of it."""
        return {"operations": self.operations, "outputs": self.outputs, "inputs": self.inputs}


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


_DEFAULTS: Final = {
    field.name: frozenset(field.default)
    for field in msgspec.structs.fields(ModelSpec)
    if field.name in ("operations", "outputs", "inputs")
}
"""What a model does whose spec does not say."""

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


class Misfit(NamedTuple):
    """A field of a spec, by its path, that names what the model's family does not do; ``does``: what it does."""

    field: str
    named: str
    does: Sequence[str]


def left_open(document: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What a model's document need not say, since its family leaves no choice.

    Operations, outputs and inputs that are not named are a family's own where the defaults of ``ModelSpec`` are none
    of its: a reranker scores. Where they are (an image model takes texts), the defaults hold, so that a spec which
    leaves them out reads the same wherever it came from.
    """
    name = document.get("family")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        return {}
    return {
        field: does
        for field, does in family.does.items()
        if field not in document and not _DEFAULTS[field].issubset(does)
    }


def misfits(spec: ModelSpec) -> Iterator[Misfit]:
    """What a spec says of itself and its family does not do; nothing is known of families that are not built in."""
    family = FAMILIES.get(spec.family)
    if family is None:
        return
    does = {**family.does, "dims": family.outputs}
    for at, part in [("", spec), *((f"{below('profiles', name)}.", one) for name, one in spec.profiles.items())]:
        for field, fits in does.items():
            yield from (
                Misfit(f"{at}{field}", one, fits) for one in getattr(part, field, None) or () if one not in fits
            )


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
