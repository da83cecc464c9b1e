"""What a model is: one validated, immutable spec. Its digest names it everywhere a model must not be mixed up."""

import hashlib
import re
from collections.abc import Collection, Mapping
from functools import cache, cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

import msgspec

from config_db.field_paths import below

Operation = Literal["encode", "score", "extract", "generate"]
Output = Literal["dense", "sparse", "multivector", "score", "json", "tokens"]
Input = Literal["text", "image", "audio", "video", "document"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Pooling = Literal["mean", "cls", "max", "last", "mean_sqrt_len"]
Tier = Literal["device", "memory", "disk"]
LatencyClass = Literal["interactive", "standard", "batch", "experiment"]
WeightsFormat = Literal["safetensors", "pickle"]

END: Final = r"$(?!\n)"
"""The end of a text in the patterns of Python and of JSON Schema; Python's ``$`` alone lets a line end slip by."""
MODEL_ID: Final = r"^[a-zA-Z0-9][a-zA-Z0-9._/-]*" + END
NAME: Final = r"^[a-zA-Z0-9][a-zA-Z0-9._-]*" + END
MACHINE_PROFILE: Final = r"^[a-z0-9][a-z0-9-]*" + END
WRITTEN_NAME: Final = r"^[a-zA-Z0-9][a-zA-Z0-9-]*" + END
"""A pool or a machine profile as a client may write it; both are lower case here."""
BUCKET: Final = r"^s3://[^/\s@]+(/[^\n]*)?" + END
MAX_ID: Final = 200
MAX_PARTS: Final = 100
"""A model has at most so many profiles, adapters and aliases: each profile is a model of its own to whoever reads."""
MAX_ENCODERS: Final = 4
_SERVED_ID: Final = r"^[a-zA-Z0-9][a-zA-Z0-9._/-]*(:[a-zA-Z0-9][a-zA-Z0-9._-]*)?" + END
"""A model's id, or that of one of its profiles, which only ``with_profile`` makes: the config DB takes no colon."""
PATTERNS_IN_WORDS: Final = {
    MODEL_ID: "letters and digits of ASCII, and after the first one also `.`, `_`, `-` and `/`",
    _SERVED_ID: "letters and digits of ASCII, and after the first one also `.`, `_`, `-` and `/`",
    NAME: "letters and digits of ASCII, and after the first one also `.`, `_` and `-`",
    MACHINE_PROFILE: "small letters and digits of ASCII, and after the first one also `-`",
    WRITTEN_NAME: "letters and digits of ASCII, and after the first one also `-`",
    BUCKET: "an address as s3://bucket/path",
}
"""What a text of these patterns is made of, for whoever sent another one."""
ModelId = Annotated[str, msgspec.Meta(pattern=MODEL_ID, max_length=MAX_ID)]
Name = Annotated[str, msgspec.Meta(pattern=NAME, max_length=64)]
MachineProfile = Annotated[str, msgspec.Meta(pattern=MACHINE_PROFILE, max_length=64)]
Positive = Annotated[int, msgspec.Meta(gt=0)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0)]
Text = Annotated[str, msgspec.Meta(max_length=10_000)]
MAX_OPTIONS_BYTES: Final = 8 << 10
MAX_PROMPTS_BYTES: Final = 64 << 10
"""Options and prompts, as JSON: every profile of a model has its own, and every reader looks at all of them."""
Outputs = Annotated[tuple[Output, ...], msgspec.Meta(max_length=MAX_PARTS)]
Dims = Annotated[dict[str, Positive], msgspec.Meta(max_length=MAX_PARTS)]

DEFAULT_PROFILE: Final = "default"
_RESERVED_END: Final = re.compile(r"(^|/)status$")

_SERVED_ONLY: Final = frozenset(
    ("aliases", "description", "profiles", "adapters", "limits", "placement", "access", "unsupported")
)
"""Fields of a model that decide neither how it loads nor what it answers."""


class FieldError(ValueError):
    """What the types let through and a spec does not; ``field`` is its path in the part that refuses it."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(what)
        self.field = field


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all parts of a spec have in common."""


class EncoderSource(_Part, frozen=True, kw_only=True):
    """A Hub repository at a revision that a model's files refer to: its config and tokenizer are used, no weights."""

    hub: Annotated[str, msgspec.Meta(pattern=MODEL_ID, max_length=MAX_ID)]
    revision: Annotated[str, msgspec.Meta(pattern=MODEL_ID, max_length=100)]

    def __post_init__(self) -> None:
        """FieldError for names that lead elsewhere."""
        for field, place in (("hub", self.hub), ("revision", self.revision)):
            if ".." in place:
                raise FieldError(field, "a source holds no '..'")


class Source(_Part, frozen=True, kw_only=True):
    """Where weights come from: a Hub repository at a revision, a bucket URI, or a directory under an allowed root.

    ``encoders`` are the repositories that the files leave config and tokenizer of an encoder to.
    """

    hub: Annotated[str, msgspec.Meta(pattern=MODEL_ID, max_length=MAX_ID)] | None = None
    revision: Annotated[str, msgspec.Meta(pattern=MODEL_ID, max_length=100)] | None = None
    bucket: Annotated[str, msgspec.Meta(pattern=BUCKET, max_length=1000)] | None = None
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)] | None = None
    encoders: Annotated[tuple[EncoderSource, ...], msgspec.Meta(max_length=MAX_ENCODERS)] = ()

    def __post_init__(self) -> None:
        """FieldError unless exactly one plain place is named, and a revision only with a Hub repository."""
        if sum(place is not None for place in (self.hub, self.bucket, self.path)) != 1:
            raise FieldError("", "a source names exactly one of hub, bucket and path")
        if self.revision is not None and self.hub is None:
            raise FieldError("revision", "a revision is of a hub repository")
        for field, place in (("hub", self.hub), ("revision", self.revision), ("bucket", self.bucket)):
            if place is not None and ".." in place:
                raise FieldError(field, "a source holds no '..'")
        if self.path is not None and (not self.path.startswith("/") or ".." in PurePosixPath(self.path).parts):
            raise FieldError("path", "a path begins with '/' and holds no '..'")
        if len({encoder.hub for encoder in self.encoders}) < len(self.encoders):
            raise FieldError("encoders", "a repository stands among the encoders once")

    def __str__(self) -> str:
        """As a person reads it."""
        return self.path or self.bucket or f"hub:{self.hub}@{self.revision or 'main'}"


class Limits(_Part, frozen=True, kw_only=True):
    """Bounds of one model.

    ``max_concurrency`` counts micro-batches at once in one worker, ``queue_limit`` requests waiting on the whole farm:
    admission takes no more than both together are. ``timeout_s`` is the deadline of a synchronous request that names
    none.
    """

    max_concurrency: Positive | None = None
    queue_limit: Positive | None = None
    timeout_s: PositiveSeconds | None = None
    max_items: Positive | None = None
    max_batch_tokens: Positive | None = None


class Placement(_Part, frozen=True, kw_only=True):
    """Where a model may run, and how close its weights are kept.

    ``tier`` is the furthest place its weights fall back to when the device needs room. ``pinned``: never evicted once
    loaded. ``preload``: loaded before anyone asks. ``sharing`` is refused where it says no
    (``config_db.documents``): models share devices. ``tenants`` reserve it to these and their pools; no
    ``machine_profiles``: any. ``latency_class``: the lane of requests that name none.
    """

    tier: Tier = "disk"
    latency_class: LatencyClass | None = None
    sharing: bool = True
    tenants: tuple[Name, ...] = ()
    machine_profiles: tuple[MachineProfile, ...] = ()
    pinned: bool = False
    preload: bool = False
    idle_unload_s: PositiveSeconds | None = None


class Access(_Part, frozen=True, kw_only=True):
    """Who may use a model: these tenants, or everyone if none is named."""

    tenants: tuple[Name, ...] = ()


class Trust(_Part, frozen=True, kw_only=True):
    """What may come with the weights: file formats that can run code. ``remote_code`` is refused: none is run."""

    remote_code: bool = False
    formats: tuple[WeightsFormat, ...] = ("safetensors",)


class Profile(_Part, frozen=True, kw_only=True):
    """A named variant: what it names replaces what the profile it extends, or the model, says."""

    extends: Name = DEFAULT_PROFILE
    outputs: Outputs | None = None
    dims: Dims | None = None
    max_length: Positive | None = None
    precision: Precision | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    prompts: dict[str, Text] | None = None
    default_prompt: Text | None = None
    templates: dict[Literal["query", "document"], Text] | None = None
    default_instruction: Text | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """FieldError for a template without the text, and for options and prompts beyond their size."""
        _check_templates(self.templates or {})
        _check_sizes(self.options, self.prompts)


class ModelSpec(_Part, frozen=True, kw_only=True, dict=True):
    """One model as the config DB names it.

    ``None`` means: as the model's own files say. ``family`` names the code that runs it (``config_db.families``).
    ``dims`` holds the width of each output, in numbers; ``matryoshka`` the smaller widths that its dense vectors were
    trained to be cut to; ``max_length`` tokens. ``prompts`` are put before a text by
    name; ``templates`` hold ``{text}`` and may hold ``{instruction}``. ``options`` are a family's own load-time
    options. ``unsupported`` says why this model cannot be served though it is known.
    """

    id: Annotated[str, msgspec.Meta(pattern=_SERVED_ID, max_length=MAX_ID + 65)]
    family: Name
    source: Source
    aliases: Annotated[tuple[ModelId, ...], msgspec.Meta(max_length=MAX_PARTS)] = ()
    description: Text | None = None
    operations: Annotated[tuple[Operation, ...], msgspec.Meta(max_length=MAX_PARTS)] = ("encode",)
    outputs: Outputs = ("dense",)
    inputs: Annotated[tuple[Input, ...], msgspec.Meta(max_length=MAX_PARTS)] = ("text",)
    dims: Dims = {}
    matryoshka: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=MAX_PARTS)] = ()
    max_length: Positive | None = None
    precision: Precision = "auto"
    pooling: Pooling | None = None
    normalize: bool | None = None
    prompts: dict[str, Text] = {}
    default_prompt: Text | None = None
    templates: dict[Literal["query", "document"], Text] = {}
    default_instruction: Text | None = None
    options: dict[str, Any] = {}
    profiles: Annotated[dict[Name, Profile], msgspec.Meta(max_length=MAX_PARTS)] = {}
    adapters: Annotated[dict[Name, Source], msgspec.Meta(max_length=MAX_PARTS)] = {}
    limits: Limits = Limits()
    placement: Placement = Placement()
    access: Access = Access()
    trust: Trust = Trust()
    unsupported: Text | None = None

    def __post_init__(self) -> None:
        """FieldError for what the types alone let through."""
        check_id("id", self.id)
        for at, alias in enumerate(self.aliases):
            check_id(f"aliases[{at}]", alias)
            if alias == self.id or alias in self.aliases[:at]:
                raise FieldError(f"aliases[{at}]", f"the alias {alias!r} stands twice, or is the model's own id")
        if not self.operations:
            raise FieldError("operations", "a model does at least one operation")
        if DEFAULT_PROFILE in self.profiles:
            raise FieldError(f"profiles.{DEFAULT_PROFILE}", "the profile `default` is the model itself")
        for name in self.profiles:
            if ".." in name:
                raise FieldError(below("profiles", name), f"the profile {name!r} makes no plain id: it holds '..'")
            self._check_chain(name)
        _check_templates(self.templates)
        _check_sizes(self.options, self.prompts)

    @cached_property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over what decides how the model loads and what it answers, as canonical JSON.

        Limits, placement, access, aliases, further profiles and adapters are left out: changing them reloads nothing.
        """
        canonical = msgspec.json.encode(_without(self, _SERVED_ONLY), order="deterministic")
        return hashlib.sha256(canonical).hexdigest()[:16]

    def with_profile(self, name: str) -> "ModelSpec":
        """The spec of a profile, under the id ``<model>:<profile>``; KeyError if there is none of this name."""
        if name == DEFAULT_PROFILE:
            return self
        changes: dict[str, Any] = {}
        for link in reversed(self._chain(name)):
            given = msgspec.structs.asdict(self.profiles[link])
            del given["extends"]
            changes.update((field, value) for field, value in given.items() if value is not None)
        return msgspec.structs.replace(self, id=f"{self.id}:{name}", profiles={}, aliases=(), **changes)

    @cached_property
    def profile_specs(self) -> "tuple[ModelSpec, ...]":
        """The specs of its profiles, each served beside the model under an id of its own."""
        return tuple(self.with_profile(name) for name in self.profiles)

    def _chain(self, name: str) -> list[str]:
        """A profile and what it extends, down to the model itself, which is left out."""
        chain = []
        while name != DEFAULT_PROFILE:
            chain.append(name)
            name = self.profiles[name].extends
        return chain

    def _check_chain(self, name: str) -> None:
        seen = [name]
        while (extended := self.profiles[seen[-1]].extends) != DEFAULT_PROFILE:
            field = f"{below('profiles', seen[-1])}.extends"
            if extended in seen:
                circle = " -> ".join([*seen[seen.index(extended) :], extended])
                raise FieldError(field, f"profiles extend each other in a circle: {circle}")
            if extended not in self.profiles:
                raise FieldError(field, f"profile `{seen[-1]}` extends `{extended}`, which there is none of")
            seen.append(extended)


def plain(part: msgspec.Struct) -> dict[str, Any]:
    """A spec, or a part of one, as plain JSON content that leaves out what is as by default.

    Equal specs give equal content, whether their authors wrote the defaults out or not.
    """
    return _without(part, frozenset())


def _without(part: msgspec.Struct, left_out: Collection[str]) -> dict[str, Any]:
    content = {}
    for field in _fields(type(part)):
        if field.name in left_out:
            continue
        value = getattr(part, field.name)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if value != default:
            content[field.name] = _plain(value)
    return content


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return plain(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return msgspec.to_builtins(value)


def check_id(field: str, name: str) -> None:
    """FieldError for an id or alias that has the letters of one and still cannot be a model's."""
    if ".." in name or not {"", "."}.isdisjoint(name.split("/")):  # clients take '/./' out of an address
        what = "it holds '..', or one of its parts is empty or '.'"
        raise FieldError(field, f"the name {name!r} is no plain path: {what}")
    if _RESERVED_END.search(name):
        raise FieldError(field, f"the last part of the name {name!r} is 'status', which is a route of the API")


def _check_templates(templates: Mapping[Literal["query", "document"], str]) -> None:
    for name, template in templates.items():
        if "{text}" not in template:
            raise FieldError(f"templates.{name}", f"the template `{name}` has no {{text}}")


def _check_sizes(options: Mapping[str, Any] | None, prompts: Mapping[str, str] | None) -> None:
    for field, part, most in (("options", options, MAX_OPTIONS_BYTES), ("prompts", prompts, MAX_PROMPTS_BYTES)):
        if part and (size := len(msgspec.json.encode(part))) > most:
            raise FieldError(field, f"{size} bytes of JSON are more than the {most} that there may be")
