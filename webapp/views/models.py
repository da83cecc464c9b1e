"""``/v1/models``: what is served, and what has become of it: loaded, loading, failed. Reading never loads a model."""

from typing import Final

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import ModelNotFoundError, ModelUnsupportedError
from config_db.families import why_unsupported
from config_db.spec import DEFAULT_PROFILE, ModelSpec, plain
from tasks.live_workers import LoadFailure
from webapp.admission import check_access, may_use
from webapp.auth.principals import principal
from webapp.farm import farm
from webapp.model_states import ModelStates
from webapp.openapi.declared import declared
from webapp.openapi.inference import EMBEDDER
from webapp.wire import answers
from webapp.wire.model_answers import LastError, ListedModel, ModelCard, ModelInfo, ModelList

bp = Blueprint("models", __name__)

_THE_MODEL: Final = {"is_default": True}


@bp.get("/v1/models")
@declared(ModelList)
def index() -> ResponseReturnValue:
    """All models, and their profiles as models of their own, by name; twice, for two kinds of clients."""
    states = farm().fleet.model_states()
    tenant = principal().tenant
    usable = (spec for spec in farm().served.all_specs() if may_use(spec, tenant))
    specs = sorted(usable, key=lambda spec: spec.id)
    infos = [_info(spec, states) for spec in specs]
    return answers.answer(ModelList(models=infos, object="list", data=[_listed(spec) for spec in specs]))


@bp.get("/v1/models/<path:model>")
@declared(ModelCard, errors=(ModelNotFoundError,), path={"model": EMBEDDER})
def show(model: str) -> ResponseReturnValue:
    """One model, by its id, an alias, or ``<either>:<profile>``."""
    spec = farm().served.model(model)
    check_access(spec, principal().tenant)
    info = _info(spec, farm().fleet.model_states())
    return answers.answer(ModelCard(**info, **_listed(spec)))


def _listed(spec: ModelSpec) -> ListedModel:
    """A model as clients of the OpenAI routes read it, beside what others read in the same answer."""
    return {"id": spec.id, "object": "model", "created": 0, "owned_by": "farmhand"}


def _info(spec: ModelSpec, states: ModelStates) -> ModelInfo:
    unsupported = why_unsupported(spec)
    state = states.state(spec.digest) if unsupported is None else "unsupported"
    return {
        "name": spec.id,
        "inputs": list(spec.inputs),
        "outputs": list(spec.outputs),
        "dims": dict(spec.dims),
        "loaded": state == "loaded",
        "state": state,
        "last_error": _met(states.last_error(spec.digest)) if unsupported is None else _never_served(unsupported),
        "max_sequence_length": spec.max_length,
        "profiles": {
            DEFAULT_PROFILE: _THE_MODEL,
            **{name: {"is_default": False, **plain(profile)} for name, profile in spec.profiles.items()},
        },
        "revision": spec.source.revision,
        "capabilities": None,
        "aliases": list(spec.aliases),
    }


def _met(failure: LoadFailure | None) -> LastError | None:
    """The error that a worker met when it loaded the model last."""
    if failure is None:
        return None
    return {
        "code": failure.code,
        "message": failure.message,
        "attempts": failure.attempts,
        "permanent": failure.permanent,
    }


def _never_served(reason: str) -> LastError:
    """Why, in the form of an error that was met when loading."""
    return {"code": ModelUnsupportedError.code, "message": reason, "attempts": 0, "permanent": True}
