"""``/v1/models``: what is served, and whether it is loaded now. Reading never loads a model."""

from typing import Any

from flask import Blueprint
from flask.typing import ResponseReturnValue

from config_db.spec import ModelSpec
from webapp.farm import farm
from webapp.wire import answers

bp = Blueprint("models", __name__)


@bp.get("/v1/models")
def index() -> ResponseReturnValue:
    """All models, by name."""
    resident = farm().fleet.resident()
    specs = sorted(farm().served.models.values(), key=lambda spec: spec.id)
    return answers.answer({"models": [_info(spec, is_loaded=spec.digest in resident) for spec in specs]})


@bp.get("/v1/models/<path:model>")
def show(model: str) -> ResponseReturnValue:
    """One model."""
    spec = farm().served.model(model)
    info = _info(spec, is_loaded=spec.digest in farm().fleet.resident())
    return answers.answer({**info, "id": spec.id, "object": "model", "created": 0, "owned_by": "farmhand"})


def _info(spec: ModelSpec, *, is_loaded: bool) -> dict[str, Any]:
    return {
        "name": spec.id,
        "inputs": list(spec.inputs),
        "outputs": list(spec.outputs),
        "dims": dict(spec.dims),
        "loaded": is_loaded,
        "state": "loaded" if is_loaded else "available",
        "last_error": None,
        "max_sequence_length": spec.max_length,
        "profiles": {"default": {"is_default": True}},
        "revision": spec.source.revision,
        "capabilities": None,
        "aliases": [],
    }
