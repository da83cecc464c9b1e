"""The kinds of models there are: what each can do, and whether this release has the code that runs it.

A model of a known family without code is kept in the config DB and refused by name (``unsupported``), so that a
catalogue can be complete before every family is.
"""

from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from config_db.spec import Input, ModelSpec, Operation, Output


class Family(msgspec.Struct, frozen=True):
    """One kind of model: what its models can do, give and take.

    ``missing`` says why it cannot be served; None: ``workers.host.families`` has its code.
    """

    operations: tuple[Operation, ...]
    outputs: tuple[Output, ...]
    inputs: tuple[Input, ...] = ("text",)
    missing: str | None = None


def _coming(
    name: str, operations: tuple[Operation, ...], outputs: tuple[Output, ...], *further_inputs: Input
) -> tuple[str, Family]:
    missing = f"the family `{name}` is not in this release yet"
    return name, Family(operations, outputs, ("text", *further_inputs), missing)


FAMILIES: Final[Mapping[str, Family]] = {
    "dense": Family(("encode",), ("dense",)),
    **dict(
        (
            _coming("sparse", ("encode",), ("sparse",)),
            _coming("multivector", ("encode", "score"), ("multivector",)),
            _coming("bge-m3", ("encode", "score"), ("dense", "sparse", "multivector")),
            _coming("cross-encoder", ("score",), ("score",)),
            _coming("causal-reranker", ("score",), ("score",)),
            _coming("token-classification", ("extract",), ("json",)),
            _coming("gliner", ("extract",), ("json",)),
            _coming("gliner2", ("extract",), ("json",)),
            _coming("gliclass", ("extract",), ("json",)),
            _coming("nli", ("extract",), ("json",)),
            _coming("clip", ("encode",), ("dense",), "image"),
            _coming("siglip", ("encode",), ("dense",), "image"),
        )
    ),
}


def why_unsupported(spec: ModelSpec, extra: Collection[str] | None = None) -> str | None:
    """Why this release cannot serve a model; None if it can.

    Args:
        spec: the model.
        extra: families of the operator's own; None: whatever is not known here is taken to be one.
    """
    if spec.unsupported is not None:
        return spec.unsupported
    if extra is not None and spec.family in extra:
        return None
    family = FAMILIES.get(spec.family)
    if family is not None:
        return family.missing
    return f"there is no family `{spec.family}`" if extra is not None else None
