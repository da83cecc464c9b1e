"""``/v1/configs/bundles`` and ``/resolve``: what a name means, and what runs it."""

from typing import Any, Final

import msgspec
from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import (
    ConfigError,
    ContentConflictError,
    DocumentError,
    ModelNotFoundError,
    NotFoundError,
    QueueUnavailableError,
)
from config_db.documents import convert
from config_db.export import to_yaml
from config_db.families import why_unsupported
from config_db.model_writes import ID_KEYS
from config_db.snapshot import NAME_SHOWN
from config_db.spec import DEFAULT_PROFILE
from webapp.bundles import BUNDLE, bundles_of, families
from webapp.farm import farm
from webapp.openapi.declared import Answered, Body, declared
from webapp.openapi.headers import ETAG
from webapp.openapi.inference import EMBEDDER
from webapp.wire import answers
from webapp.wire import configs as wire
from webapp.wire.config_answers import Bundle, BundleContent, BundleList, Resolved
from webapp.wire.headers import JSON

bp = Blueprint("config_bundles", __name__)
wire.install(bp)

_PRIORITY: Final = 10
_SOURCE: Final = "filesystem"


class ResolveBody(msgspec.Struct):
    """What to resolve; ``model`` may name a bundle itself, as ``bundle:/org/model``."""

    model: str
    bundle: str | None = None


@bp.get("/v1/configs/bundles")
@declared(BundleList, errors=(QueueUnavailableError,))
def index() -> ResponseReturnValue:
    """The one bundle."""
    here = farm()
    bundle = Bundle(
        bundle_id=BUNDLE,
        priority=_PRIORITY,
        adapter_count=len(families(here.settings.family_places)),
        source=_SOURCE,
        connected_workers=len(here.fleet.workers()),
    )
    return answers.answer(BundleList(bundles=[bundle]))


@bp.get("/v1/configs/bundles/<path:bundle>")
@declared(
    Answered(BundleContent, "The families.", (wire.YAML,), (ETAG,)), errors=(NotFoundError,), path={"bundle": BUNDLE}
)
def show(bundle: str) -> ResponseReturnValue:
    """What is in the bundle: families."""
    here = farm()
    if bundle != BUNDLE:
        raise NotFoundError(f"there is no bundle {bundle[:100]!r}: the only one is {BUNDLE!r}", param="bundle")
    adapters = families(here.settings.family_places)
    content = BundleContent(name=BUNDLE, priority=_PRIORITY, source=_SOURCE, adapters=adapters)
    return wire.yaml_answer(to_yaml(content), epoch=here.served.epoch)


@bp.post("/v1/configs/resolve")
@declared(
    Resolved,
    body=Body(ResolveBody, {"model": EMBEDDER}, (JSON, wire.YAML)),
    errors=(ConfigError, DocumentError, ModelNotFoundError, ContentConflictError),
)
def resolve() -> ResponseReturnValue:
    """Which model a name means, and which bundle runs it."""
    here = farm()
    body = convert(_under_model(wire.read_write().document), ResolveBody)
    prefix, colon, rest = body.model.partition(":/")
    name, bundle = (rest, prefix) if colon else (body.model, body.bundle)
    try:
        spec = here.served.model(name)
    except ModelNotFoundError as error:
        named = {**error.details, "model_id": name[:NAME_SHOWN]}
        raise ModelNotFoundError(error.message, param="model", details=named) from error
    compatible = bundles_of(spec, here.settings.family_places)
    if bundle is not None and bundle not in compatible:
        raise ContentConflictError(
            f"the bundle {bundle[:100]!r} does not run the model {spec.id!r}",
            param="bundle",
            details={"model": spec.id, "compatible_bundles": compatible},
        )
    return answers.answer(
        Resolved(
            model=spec.id,
            resolved_bundle=BUNDLE if compatible else None,
            compatible_bundles=compatible,
            profiles=[DEFAULT_PROFILE, *spec.profiles],
            unsupported=why_unsupported(spec, here.settings.family_places),
        )
    )


def _under_model(document: Any) -> Any:
    """The body with the name under ``model``: elsewhere in these routes it stands under ``model_id`` or ``sie_id``."""
    if not isinstance(document, dict) or "model" in document:
        return document
    key = next((key for key in ID_KEYS if key in document), "model")
    return {"model" if name == key else name: value for name, value in document.items()}
