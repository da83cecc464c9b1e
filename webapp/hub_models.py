"""The model that a request names: of the snapshot, else, where the operator allows it, as the Hub has it."""

from typing import Final, cast

from flask import current_app

from common.errors import ModelNotFoundError
from config_db.auto import Found, Registrar, read_allow
from config_db.engine import open_engine
from config_db.hub import Hub
from webapp.farm import Farm

_EXTENSION: Final = "farmhand_hub"


def find(here: Farm, name: str) -> Found:
    """The spec of a model and the epoch it is of.

    The first request for a model of the Hub waits for the look-up; others are served meanwhile, since sockets yield.

    Raises:
        ModelNotFoundError: not served, and not to be had.
        FarmError: as ``config_db.auto.Registrar.find``.
    """
    served = here.served
    try:
        return Found(served.model(name), served.epoch)
    except ModelNotFoundError:
        allow = read_allow(served.settings)
        found = _registrar(here).find(name, allow=allow, epoch_id=served.epoch_id) if allow.patterns else None
        if found is None:
            raise
        return found


def _registrar(here: Farm) -> Registrar:
    """This application's, made when it is first needed: most farms never ask the Hub."""
    if _EXTENSION not in current_app.extensions:
        engine = open_engine(here.settings.database_url)
        current_app.extensions[_EXTENSION] = Registrar(engine, Hub().describe)
    return cast("Registrar", current_app.extensions[_EXTENSION])
