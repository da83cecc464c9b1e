"""Writing one model by its document: added to, replaced, merged into or deleted, each as one epoch.

Each function takes the epoch's lock before it reads, so that what it decides on is still true when it writes.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from common.errors import ConfigError, ContentConflictError, ModelNotFoundError, RequestError
from config_db import sie
from config_db.diff import differences, is_same
from config_db.documents import read_model
from config_db.epochs import lock_epoch
from config_db.publish import Delete, Published, Put, live, publish
from config_db.refusals import in_words
from config_db.rows import newer_fields, read_row
from config_db.schema import ModelRow
from config_db.spec import DEFAULT_PROFILE, FieldError, ModelId, ModelSpec, check_id, plain

ID_KEYS: Final = ("model_id", "sie_id", "id")
_FIELDS_SHOWN: Final = 10
_NONE: Final[Mapping[str, str]] = MappingProxyType({})
_MERGED: Final = ("profiles", "adapters")
"""What adding to a model adds to; every other field must be as it is."""


class Given(msgspec.Struct, frozen=True):
    """What a document says of one model, in our fields and without its id; ``warnings`` say what was left out.

    ``origins`` are where the fields of a translated document stood in it (``config_db.sie``).
    """

    model_id: str
    fields: dict[str, Any]
    warnings: tuple[str, ...] = ()
    origins: Mapping[str, str] = _NONE


class Intent(msgspec.Struct, frozen=True):
    """Who writes, why, and which epoch they have read; None: whatever it is now."""

    actor: str
    reason: str
    expected: int | None = None


class Written(msgspec.Struct, frozen=True):
    """What a write did: ``created`` and ``skipped`` are profiles, of which the model itself is ``default``."""

    spec: ModelSpec
    published: Published
    is_new: bool = False
    created: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def check_model_id(name: str) -> str:
    """The id of a model; RequestError if none can have this name."""
    try:
        msgspec.convert(name, ModelId)
        check_id("model_id", name)
    except (msgspec.ValidationError, FieldError) as error:
        what = in_words(str(error))
        message = f"{name[:200]!r} cannot be the id of a model: {what[:1].lower()}{what[1:]}"
        raise RequestError(message, param="model_id") from error
    return name


def understand(document: Any, *, model_id: str | None = None, places: Mapping[str, str] = _NONE) -> Given:
    """A document, ours or of the public form, whose id stands under any of ``ID_KEYS``.

    Args:
        document: what ``config_db.documents.parse`` gave.
        model_id: the id that it must have if it names one.
        places: the operator's own families, ``module:Class`` by name.

    Raises:
        ConfigError: it names no model, or two.
        RequestError: no model can have such an id.
    """
    if not isinstance(document, dict):
        raise ConfigError("a model is a mapping of fields")
    fields = {name: value for name, value in document.items() if name not in ID_KEYS}
    ids = {name: document[name] for name in ID_KEYS if name in document} | ({"": model_id} if model_id else {})
    if not ids:
        raise ConfigError("model_id: this field is required", param="model_id")
    for name, value in ids.items():
        if not isinstance(value, str):
            raise ConfigError(f"{name}: the id of a model is a text", param=name)
    first, *others = dict.fromkeys(ids.values())
    if others:
        raise ConfigError(f"two ids are named, {first[:200]!r} and {others[0][:200]!r}", param=next(iter(ids)))
    check_model_id(first)
    if not sie.is_sie(fields):
        return Given(first, fields)
    translated = sie.translate(fields, places=places)
    return Given(first, translated.fields, translated.warnings, translated.origins)


def add(session: Session, given: Given, intent: Intent, *, families: Collection[str]) -> Written:
    """Add a model, or the profiles and adapters that it has not yet. Nothing that is there is changed.

    Raises:
        ContentConflictError: the model is there, and something of it is not as the document says.
        ConfigError: the document makes no model.
        EpochConflictError: something was published since ``intent.expected``.
    """
    stored = _stored(session, given.model_id)
    if stored is None:
        spec = _read(given, given.fields, families)
        return Written(spec, _put(session, spec, intent), is_new=True, created=_created(None, spec))
    merged = dict(given.fields)
    for field in _MERGED:
        parts = given.fields.get(field)
        if isinstance(parts, dict):
            merged[field] = {**stored.get(field, {}), **parts}
    spec = _read(given, {**stored, **merged}, families)
    _check_unchanged(stored, plain(spec), given)
    published = _put(session, spec, intent)
    itself = () if given.fields.keys() <= set(_MERGED) else (DEFAULT_PROFILE,)
    skipped = [name for name in given.fields.get("profiles") or {} if name in stored.get("profiles", {})]
    return Written(spec, published, created=_created(stored, spec), skipped=(*itself, *skipped))


def replace(session: Session, given: Given, intent: Intent, *, families: Collection[str]) -> Written:
    """Make a model what its document says, whatever it was.

    Raises:
        ConfigError: the document makes no model.
        EpochConflictError: something was published since ``intent.expected``.
    """
    lock_epoch(session)
    stored = live(session, "model", [given.model_id]).get(given.model_id)
    spec = _read(given, given.fields, families)
    return Written(spec, _put(session, spec, intent), is_new=stored is None, created=_created(stored, spec))


def merge(session: Session, model_id: str, patch: Any, intent: Intent, *, families: Collection[str]) -> Written:
    """Change some fields of a model as RFC 7386 has it: null takes a field away, a mapping is merged.

    Raises:
        ModelNotFoundError: there is no such model.
        ConfigError: what comes of it is no model, or one with another id.
        EpochConflictError: something was published since ``intent.expected``.
    """
    if not isinstance(patch, dict):
        raise ConfigError("a patch is a mapping of fields")
    stored = _stored(session, model_id)
    if stored is None:
        raise _not_found(session, model_id)
    merged = _merge(stored, patch)
    given = understand(merged, model_id=model_id)
    spec = _read(given, given.fields, families)
    return Written(spec, _put(session, spec, intent), created=_created(stored, spec))


def remove(session: Session, model_id: str, intent: Intent) -> Published:
    """Delete a model.

    Raises:
        ModelNotFoundError: there is no such model.
        EpochConflictError: something was published since ``intent.expected``.
    """
    lock_epoch(session)
    if not live(session, "model", [model_id]):
        raise _not_found(session, model_id)
    return publish(
        session, [Delete("model", model_id)], actor=intent.actor, reason=intent.reason, expected=intent.expected
    )


def _stored(session: Session, model_id: str) -> dict[str, Any] | None:
    """What a model is now, by its document; nobody changes it before the session ends."""
    lock_epoch(session)
    content = live(session, "model", [model_id]).get(model_id)
    if content is None:
        return None
    newer = newer_fields(ModelSpec, content)
    if newer:
        raise ContentConflictError(
            f"a newer release has written {', '.join(newer[:_FIELDS_SHOWN])} of the model {model_id!r}, which this one "
            "would take away: change it through the newer release, or PUT it",
            details={"newer_fields": newer[:_FIELDS_SHOWN]},
        )
    try:
        return plain(read_row(model_id, content))
    except msgspec.ValidationError as error:
        message = f"the model {model_id!r} was written by another release, in a way that this one cannot read: PUT it"
        raise ContentConflictError(message) from error


def _read(given: Given, fields: Mapping[str, Any], families: Collection[str]) -> ModelSpec:
    try:
        return read_model({**fields, "id": given.model_id}, families=families)
    except ConfigError as error:
        told = sie.in_their_words(error, given.origins)
        if told is error:
            raise
        raise told from error


def _put(session: Session, spec: ModelSpec, intent: Intent) -> Published:
    put = Put("model", spec.id, plain(spec))
    return publish(session, [put], actor=intent.actor, reason=intent.reason, expected=intent.expected)


def _check_unchanged(stored: Mapping[str, Any], now: Mapping[str, Any], given: Given) -> None:
    """ContentConflictError if what was there would be changed."""
    old, new = {**stored}, {**now}
    for field in _MERGED:
        old[field] = stored.get(field, {})
        new[field] = {name: part for name, part in now.get(field, {}).items() if name in old[field]}
    found = differences(old, new)
    if not found:
        return
    profiles = [name for name in old["profiles"] if not is_same(old["profiles"][name], new["profiles"][name])]
    fields = sorted(name for name in {*old, *new} if name != "profiles" and not is_same(old.get(name), new.get(name)))
    raise ContentConflictError(
        f"the model {given.model_id!r} is there already, with another {found[0].path}: PUT or PATCH it to change it",
        param=found[0].path,
        details={
            "conflicting_fields": fields,
            "conflicting_profiles": profiles,
            "differences": [{"field": one.path, **_sides(one.old, one.new)} for one in found],
        },
    )


def _sides(old: Any, new: Any) -> dict[str, Any]:
    return {name: side for name, side in (("stored", old), ("given", new)) if side is not msgspec.UNSET}


def _merge(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge(merged.get(name), value)
    return merged


def _created(stored: Mapping[str, Any] | None, spec: ModelSpec) -> tuple[str, ...]:
    """The profiles that a write brought; the model itself is one."""
    if stored is None:
        return (DEFAULT_PROFILE, *spec.profiles)
    return tuple(name for name in spec.profiles if name not in stored.get("profiles", {}))


def _not_found(session: Session, name: str) -> ModelNotFoundError:
    """Also for an alias, which a model is read by and not changed by."""
    owner = session.scalars(
        select(ModelRow.id).where(ModelRow.deleted_at.is_(None), ModelRow.spec["aliases"].contains([name]))
    ).first()
    hint = f": it is an alias of {owner!r}, which is changed by its id" if owner is not None else ""
    return ModelNotFoundError(f"there is no model {name!r}{hint}", param="model_id", details={"model_id": name})
