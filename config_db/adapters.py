"""Which adapter a request means: a name from its model's spec, or a Hub repository that the operator allows.

The setting ``adapters.allow`` turns the second on. An adapter is known by the digest of its source from here on, never
by its name: two models may call different adapters alike, and a name may be given to another adapter later.
"""

import difflib
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final

import msgspec

from common.errors import RequestError
from common.logs import get_logger
from config_db.families import takes_adapters
from config_db.spec import MAX_ID, FieldError, ModelSpec, Source, plain

log = get_logger("config_db")

SETTING: Final = "adapters.allow"
ALIASES: Final = ("lora", "lora_id")
"""The options that name an adapter."""
NAME_SHOWN: Final = 100
NEAREST: Final = 3


class AllowAdapters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the setting: patterns of Hub repositories, as in a shell, ``org/*``."""

    patterns: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)], ...] = ()


def adapter_digest(source: Source) -> str:
    """16 hex digits of SHA-256 over where an adapter comes from."""
    return hashlib.sha256(msgspec.json.encode(plain(source), order="deterministic")).hexdigest()[:16]


def adapter_source(options: Mapping[str, Any]) -> Source:
    """Where the adapter comes from that a request on its way to its host asks for.

    Raises:
        RequestError: what stands there is no source.
    """
    try:
        return msgspec.convert(options.get("lora"), Source)
    except (msgspec.ValidationError, FieldError) as error:
        message = "the request does not say where its adapter comes from"
        raise RequestError(message, param="params.options.lora") from error


def name_adapter(
    spec: ModelSpec, settings: Mapping[str, Any], options: Mapping[str, Any], *, param: str
) -> tuple[str | None, dict[str, Any]]:
    """The digest of the adapter that options name as ``lora`` or ``lora_id``, and the options as a host reads them.

    Under ``lora`` stands where the adapter comes from, then.

    Args:
        spec: of the model.
        settings: of the snapshot.
        options: of the request.
        param: where they stand in its body.

    Raises:
        RequestError: there is none of this name, or both name different ones.
    """
    rest = {field: value for field, value in options.items() if field not in ALIASES}
    named = {field: options[field] for field in ALIASES if options.get(field) is not None}
    if not named:
        return None, rest
    sources = {field: find_adapter(spec, settings, name, param=f"{param}.{field}") for field, name in named.items()}
    if len(set(sources.values())) > 1:
        raise RequestError("lora and lora_id mean the same and name different adapters", param=f"{param}.lora_id")
    source = next(iter(sources.values()))
    return adapter_digest(source), {**rest, "lora": plain(source)}


def find_adapter(spec: ModelSpec, settings: Mapping[str, Any], name: object, *, param: str) -> Source:
    """Where the adapter comes from that a request for this model names; ``param``: where it names it.

    Raises:
        RequestError: no model of this family takes adapters, or there is none of this name;
            ``details["nearest"]`` lists similar names.
    """
    if not isinstance(name, str) or not name:
        raise RequestError("an adapter is named by a string", param=param)
    if not takes_adapters(spec.family):
        raise RequestError(f"model {spec.id!r} is of the family {spec.family}, which takes no adapters", param=param)
    source = spec.adapters.get(name) or _allowed(settings, name)
    if source is None:
        nearest = _nearest(name, spec)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else _listed(spec)
        message = f"model {spec.id!r} has no adapter {name[:NAME_SHOWN]!r}{hint}"
        raise RequestError(message, param=param, details={"nearest": nearest})
    return source


def _allowed(settings: Mapping[str, Any], name: str) -> Source | None:
    """The Hub repository of this name, if a pattern of the setting lets it in."""
    patterns = read_allowed(settings).patterns
    if len(name) > MAX_ID or not any(fnmatchcase(name, pattern) for pattern in patterns):
        return None
    try:
        return msgspec.convert({"hub": name}, Source)
    except (msgspec.ValidationError, FieldError):  # a pattern may be wider than what can be a repository
        return None


def read_allowed(settings: Mapping[str, Any]) -> AllowAdapters:
    """The setting as a snapshot's settings have it; nothing is allowed where it is missing or broken."""
    try:
        return msgspec.convert(settings.get(SETTING, {}), AllowAdapters)
    except msgspec.ValidationError as error:
        log.warning("setting_unreadable", setting=SETTING, error=str(error))
        return AllowAdapters()


def _nearest(name: str, spec: ModelSpec) -> list[str]:
    by_lower = {known.lower(): known for known in sorted(spec.adapters)}
    close = difflib.get_close_matches(name[:MAX_ID].lower(), by_lower, NEAREST, 0.5)
    return [by_lower[one] for one in close]


def _listed(spec: ModelSpec) -> str:
    names = ", ".join(list(spec.adapters)[:10])
    return f"; it has {names}" if names else "; it has none"
