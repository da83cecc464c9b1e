"""What a model is: one validated, immutable spec. Its digest names it everywhere a model must not be mixed up."""

import hashlib
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec

Operation = Literal["encode", "score", "extract"]
Output = Literal["dense", "sparse", "multivector", "score", "json"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Pooling = Literal["mean", "cls", "max", "last", "mean_sqrt_len"]
ModelId = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._/-]*$", max_length=200)]


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the weights come from: a Hub repository at a revision, or a directory under an allowed root."""

    hub: str | None = None
    revision: str | None = None
    path: str | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Bounds of one model. ``timeout_s`` is the deadline of a synchronous request that names none."""

    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_items: Annotated[int, msgspec.Meta(gt=0)] | None = None
    max_batch_tokens: Annotated[int, msgspec.Meta(gt=0)] | None = None
    max_concurrency: Annotated[int, msgspec.Meta(gt=0)] | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """One model as the config DB names it.

    ``None`` means: as the model's own files say. ``family`` names the code that runs it (``workers.host.families``).
    ``dims`` holds the width of each output, in numbers. ``options`` are a family's own load-time options.
    """

    id: ModelId
    family: str
    source: Source
    operations: tuple[Operation, ...] = ("encode",)
    outputs: tuple[Output, ...] = ("dense",)
    inputs: tuple[str, ...] = ("text",)
    dims: dict[str, int] = {}
    max_length: Annotated[int, msgspec.Meta(gt=0)] | None = None
    precision: Precision = "auto"
    pooling: Pooling | None = None
    normalize: bool | None = None
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
    limits: Limits = Limits()
    pinned: bool = False
    preload: bool = False
    machine_profiles: tuple[str, ...] = ()
    options: dict[str, Any] = {}

    @cached_property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over the canonical JSON: equal specs, equal digest, in every process."""
        canonical = msgspec.json.encode(self, order="deterministic")
        return hashlib.sha256(canonical).hexdigest()[:16]
