"""``/openapi.json``: this API as a document; ``/docs``: the same as pages, which load nothing from elsewhere."""

from typing import Any, Final

from flask import Blueprint, Response, current_app
from flask.typing import ResponseReturnValue
from flask_swagger_ui import get_swaggerui_blueprint

from webapp.openapi.declared import declared
from webapp.openapi.document import document_text
from webapp.openapi.routes import PAGES
from webapp.wire.headers import JSON, set_common

bp = Blueprint("docs", __name__)

PLACE: Final = "/openapi.json"
_KEPT: Final = "farmhand.openapi"
_SHOWN: Final = {
    "app_name": "Farmhand",
    "layout": "BaseLayout",
    "defaultModelsExpandDepth": 0,
    "validatorUrl": None,  # else the document's address is told to a public service
    "oauth2RedirectUrl": "",  # else it is made of what the caller says the host is
}
pages = get_swaggerui_blueprint("/docs", PLACE, _SHOWN, blueprint_name=PAGES)


@bp.get(PLACE)
@declared(dict[str, Any])
def show() -> ResponseReturnValue:
    """This document."""
    kept = current_app.extensions
    if _KEPT not in kept:
        kept[_KEPT] = document_text(current_app)
    response = Response(kept[_KEPT], content_type=JSON)
    set_common(response)
    return response
