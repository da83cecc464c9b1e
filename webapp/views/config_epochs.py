"""``/v1/configs``: the epoch, who serves which, the history of epochs, and the way back to one."""

from datetime import UTC, datetime
from time import monotonic
from typing import Annotated, Final

import gevent
import msgspec
from flask import Blueprint, request
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session

from common.errors import (
    ConfigUnavailableError,
    ModelNotFoundError,
    NotFoundError,
    QueueUnavailableError,
    RequestError,
)
from config_db.documents import convert
from config_db.epochs import epoch_now
from config_db.export import model_yaml
from config_db.history import HistoryPage, changes_between, read_history
from config_db.idempotency import Answer
from config_db.model_writes import Intent, check_model_id
from config_db.past import rollback
from config_db.spec import ModelId, plain
from webapp.bundles import bundle_status, bundles_of, families_hash
from webapp.config_store import config_store
from webapp.config_writes import write
from webapp.farm import farm
from webapp.fleet import has_converged, present_of
from webapp.openapi.declared import Answered, Body, Parameter, declared
from webapp.openapi.headers import ETAG, REPLAYED, WAIT, WRITE_ERRORS, WRITES, an_epoch
from webapp.openapi.inference import EMBEDDER
from webapp.wire import answers
from webapp.wire import configs as wire
from webapp.wire.config_answers import (
    Convergence,
    Diff,
    EpochServed,
    Export,
    ExportedModel,
    ModelStatus,
    RolledBack,
    RowNamed,
)
from webapp.wire.headers import JSON
from webapp.wire.queries import read_number, read_wait_s

bp = Blueprint("config_epochs", __name__)
wire.install(bp)

MAX_WAIT_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.1
MAX_PAGE: Final = 200
_PAGE: Final = 50


class RollbackBody(msgspec.Struct, forbid_unknown_fields=True):
    """The epoch whose contents are to come back."""

    epoch: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


@bp.get("/v1/configs/epoch")
@declared(EpochServed)
def epoch() -> ResponseReturnValue:
    """The epoch that this process serves."""
    here = farm()
    body = EpochServed(
        epoch=here.served.epoch,
        bundles_hash=families_hash(here.settings.family_places),
        epoch_id=str(here.served.epoch_id),
    )
    return answers.answer(body)


@bp.get("/v1/configs/status")
@declared(
    Convergence, parameters=(WAIT, an_epoch("epoch", "The epoch that is wanted.")), errors=(QueueUnavailableError,)
)
def status() -> ResponseReturnValue:
    """Who serves which epoch; ``?wait=s`` waits until all serve this process's, ``?epoch=n`` until all serve that."""
    here = farm()
    wait_s = read_wait_s(MAX_WAIT_S)
    deadline = monotonic() + wait_s
    wanted = read_number("epoch")
    look = here.fleet.epochs if wait_s == 0 else here.fleet.epochs_lately  # who waits sees what others have seen
    while True:
        served, processes = here.served, look()
        is_done = has_converged(processes, present_of(served), wanted)
        if is_done or monotonic() >= deadline:
            break
        gevent.sleep(_LOOK_EVERY_S)
    body = Convergence(
        epoch=served.epoch,
        epoch_id=str(served.epoch_id),
        converged=is_done,
        config_db="connected" if here.snapshots.is_connected else "away",
        processes=processes,
    )
    return answers.answer(body)


@bp.get("/v1/configs/models/<path:model>/status")
@declared(ModelStatus, errors=(RequestError, ModelNotFoundError, QueueUnavailableError), path={"model": EMBEDDER})
def model_status(model: str) -> ResponseReturnValue:
    """Which workers have read a model as it is now."""
    here = farm()
    served = here.served
    spec = served.model(check_model_id(model))
    processes = here.fleet.epochs()
    known = bundles_of(spec, here.settings.family_places)
    bundles = [bundle_status(spec, processes, present_of(served))] if known else []
    return answers.answer(
        ModelStatus(
            model_id=spec.id,
            config_epoch=served.epoch,
            all_bundles_acked=bool(bundles) and all(bundle["acked"] for bundle in bundles),
            no_bundles=not bundles,
            bundles=bundles,
            source=served.origins.get(spec.id, "filesystem"),
        )
    )


@bp.get("/v1/configs/export")
@declared(Export)
def export() -> ResponseReturnValue:
    """Everything that is served, as of one epoch."""
    here = farm()
    served = here.served
    models = []
    for model_id, spec in sorted(served.models.items()):
        gevent.sleep(0)  # others are answered between two models
        models.append(
            ExportedModel(
                model_id=model_id,
                model_config=plain(spec),
                raw_yaml=model_yaml(spec),
                affected_bundles=bundles_of(spec, here.settings.family_places),
            )
        )
    generated_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return answers.answer(Export(snapshot_version=1, epoch=served.epoch, generated_at=generated_at, models=models))


@bp.get("/v1/configs/history")
@declared(
    HistoryPage,
    parameters=(
        Parameter(
            name="limit",
            place="query",
            kind=Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)],
            meaning="So many epochs at most.",
        ),
        an_epoch("before", "Epochs before this one: `before` of the page before."),
        Parameter(name="model", place="query", kind=ModelId, meaning="Changes of this model only."),
    ),
    errors=(ConfigUnavailableError,),
)
def history() -> ResponseReturnValue:
    """What was changed, newest first; ``?before=<epoch>`` is the next page, ``?model=<id>`` that of one model."""
    limit = read_number("limit", at_least=1, at_most=MAX_PAGE) or _PAGE
    before, model = read_number("before"), request.args.get("model")
    if model is not None:
        check_model_id(model)
    with config_store().read() as session:
        page = read_history(session, limit=limit, before=before, model=model)
    return answers.answer(msgspec.to_builtins(page))


@bp.get("/v1/configs/diff")
@declared(
    Diff,
    parameters=(
        an_epoch("from", "The older epoch.", is_required=True, example=1),
        an_epoch("to", "The newer one; the present one unless named."),
    ),
    errors=(NotFoundError, ConfigUnavailableError),
)
def diff() -> ResponseReturnValue:
    """What differs between two epochs; ``to`` is the present one unless named."""
    old, new = read_number("from"), read_number("to")
    if old is None:
        raise RequestError("from: this parameter is required, an epoch", param="from")
    with config_store().read() as session:
        if new is None:
            new, _ = epoch_now(session)
        changes = changes_between(session, old, new)
    return answers.answer(Diff({"from": old, "to": new, "changes": msgspec.to_builtins(changes)}))


@bp.post("/v1/configs/rollback")
@declared(
    Answered(RolledBack, "The new epoch.", headers=(ETAG, REPLAYED)),
    body=Body(RollbackBody, {"epoch": 2}, (JSON, wire.YAML)),
    parameters=WRITES,
    errors=WRITE_ERRORS,
)
def roll_back() -> ResponseReturnValue:
    """A new epoch with the contents of an old one."""
    incoming = wire.read_write()
    to = convert(incoming.document, RollbackBody).epoch

    def change(session: Session, intent: Intent) -> Answer:
        published = rollback(session, to, actor=intent.actor, reason=intent.reason, expected=intent.expected)
        changes = [RowNamed(kind=change.kind, name=change.name) for change in published.changes]
        return wire.encoded(RolledBack(**wire.epoch_named(published), rolled_back_to=to, changes=changes))

    return write(incoming, change)
