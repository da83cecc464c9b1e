"""``/v1/configs/models``: the models as they stand in the config DB, read and written."""

from collections.abc import Sequence
from os import getpid
from socket import gethostname
from typing import Any, Final

from flask import Blueprint
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session

from common.errors import ContentConflictError, ModelNotFoundError, RequestError
from config_db import model_writes
from config_db.export import model_yaml
from config_db.families import in_vain, why_unsupported
from config_db.idempotency import Answer
from config_db.json_schema import model_schema
from config_db.model_roots import outside
from config_db.model_writes import Intent, Written, check_model_id, understand
from config_db.spec import DEFAULT_PROFILE, ModelSpec
from webapp.bundles import bundles_of
from webapp.config_writes import write
from webapp.farm import farm
from webapp.openapi.declared import Answered, Body, declared
from webapp.openapi.headers import ETAG, REPLAYED, WRITE_ERRORS, WRITES
from webapp.wire import answers
from webapp.wire import configs as wire
from webapp.wire.config_answers import ModelDeleted, ModelEntry, ModelIndex, ModelWritten
from webapp.wire.headers import JSON

bp = Blueprint("configs", __name__)
wire.install(bp)

_EXAMPLE: Final = "acme/embedder"
_DOCUMENT: Final = {"id": _EXAMPLE, "family": "dense", "source": {"hub": _EXAMPLE}, "dims": {"dense": 384}}
_BODY: Final = Body(ModelSpec, _DOCUMENT, (JSON, wire.YAML))
_DONE: Final = Answered(ModelWritten, "Written; nothing came into being.", headers=(ETAG, REPLAYED))
_CREATED: Final = Answered(ModelWritten, "Written: a model or a profile came into being.", headers=(ETAG, REPLAYED))

MOST_WARNINGS: Final = 50
WARNING_SHOWN: Final = 300
"""Answers are kept under idempotency keys, and a document may have a hundred thousand fields that are left out."""


@bp.get("/v1/configs/models")
@declared(ModelIndex)
def index() -> ResponseReturnValue:
    """All models, by name, and how they came here."""
    served = farm().served
    models = [
        ModelEntry(
            model_id=model_id,
            profiles=[DEFAULT_PROFILE, *spec.profiles],
            source=served.origins.get(model_id, "filesystem"),
        )
        for model_id, spec in sorted(served.models.items())
    ]
    return answers.answer(ModelIndex(models=models))


@bp.get("/v1/configs/models/<path:model>")
@declared(
    Answered(ModelSpec, "The document.", (wire.YAML,), (ETAG,)),
    errors=(RequestError, ModelNotFoundError),
    path={"model": _EXAMPLE},
)
def show(model: str) -> ResponseReturnValue:
    """One model as a document that can be written back."""
    served = farm().served
    spec = served.model(check_model_id(model))
    return wire.yaml_answer(model_yaml(spec), epoch=served.epoch)


@bp.get("/v1/configs/schema")
@declared(dict[str, Any])
def schema() -> ResponseReturnValue:
    """The JSON Schema of a model's document."""
    return answers.answer(model_schema())


@bp.post("/v1/configs/models")
@declared(_DONE, more={201: _CREATED}, body=_BODY, parameters=WRITES, errors=(*WRITE_ERRORS, ContentConflictError))
def add() -> ResponseReturnValue:
    """Add a model, or profiles to one; what is there stays as it is."""
    incoming = wire.read_write()
    families = farm().settings.family_places
    given = understand(incoming.document, places=families)

    def change(session: Session, intent: Intent) -> Answer:
        written = model_writes.add(session, given, intent, families=families)
        return _answer(written, given.warnings, status=201 if written.created else 200)

    return write(incoming, change)


@bp.put("/v1/configs/models/<path:model>")
@declared(_DONE, more={201: _CREATED}, body=_BODY, parameters=WRITES, errors=WRITE_ERRORS, path={"model": _EXAMPLE})
def replace(model: str) -> ResponseReturnValue:
    """Make a model what the document says."""
    incoming = wire.read_write()
    families = farm().settings.family_places
    given = understand(incoming.document, model_id=check_model_id(model), places=families)

    def change(session: Session, intent: Intent) -> Answer:
        written = model_writes.replace(session, given, intent, families=families)
        return _answer(written, given.warnings, status=201 if written.is_new else 200)

    return write(incoming, change)


@bp.patch("/v1/configs/models/<path:model>")
@declared(
    _DONE,
    body=Body(dict[str, Any], {"description": "Embeds."}, (JSON, wire.MERGE_PATCH, wire.YAML)),
    parameters=WRITES,
    errors=WRITE_ERRORS,
    path={"model": _EXAMPLE},
)
def merge(model: str) -> ResponseReturnValue:
    """Change some fields of a model (RFC 7386)."""
    incoming = wire.read_write()
    families = farm().settings.family_places
    model_id = check_model_id(model)

    def change(session: Session, intent: Intent) -> Answer:
        written = model_writes.merge(session, model_id, incoming.document, intent, families=families)
        return _answer(written)

    return write(incoming, change)


@bp.delete("/v1/configs/models/<path:model>")
@declared(
    Answered(ModelDeleted, headers=(ETAG, REPLAYED)), parameters=WRITES, errors=WRITE_ERRORS, path={"model": _EXAMPLE}
)
def remove(model: str) -> ResponseReturnValue:
    """Delete a model."""
    model_id = check_model_id(model)

    def change(session: Session, intent: Intent) -> Answer:
        published = model_writes.remove(session, model_id, intent)
        return wire.encoded(ModelDeleted(model_id=model_id, deleted=True, **wire.epoch_named(published)))

    return write(wire.read_write(has_document=False), change)


def _answer(written: Written, left_out: Sequence[str] = (), *, status: int = 200) -> Answer:
    """The answer to a write of one model."""
    settings = farm().settings
    spec, families = written.spec, settings.family_places
    unsupported = why_unsupported(spec, families)
    kept = [] if unsupported is None else [f"the model is kept, but cannot be served: {unsupported}"]
    body = ModelWritten(
        model_id=spec.id,
        created_profiles=list(written.created),
        existing_profiles_skipped=list(written.skipped),
        warnings=[*kept, *_shown([*in_vain(spec), *outside(spec, settings.model_roots), *left_out])],
        routable_bundles_by_profile={name: bundles_of(spec, families) for name in written.created},
        router_id=f"{gethostname()}:{getpid()}",
        **wire.epoch_named(written.published),
    )
    return wire.encoded(body, status=status)


def _shown(warnings: Sequence[str]) -> list[str]:
    shown = [one if len(one) <= WARNING_SHOWN else f"{one[:WARNING_SHOWN]}…" for one in warnings[:MOST_WARNINGS]]
    more = len(warnings) - len(shown)
    return [*shown, f"and {more} more of this kind"] if more else shown
