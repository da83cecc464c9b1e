"""One config write from its headers to its answer, the same for every route that changes something."""

from collections.abc import Callable
from time import monotonic
from typing import Final

import gevent
from flask import Response
from sqlalchemy.orm import Session

from config_db.idempotency import Answer
from config_db.model_writes import Intent
from webapp.auth.principals import principal
from webapp.config_store import config_store
from webapp.farm import Farm, farm
from webapp.wire import configs as wire
from webapp.wire.configs import Incoming
from webapp.wire.headers import read_idempotency_key

SEEN_WITHIN_S: Final = 1.0
"""A writer waits so long at most for this process to serve what it has written."""
_LOOK_EVERY_S: Final = 0.01


def write(incoming: Incoming, change: Callable[[Session, Intent], Answer]) -> Response:
    """Make a change as the headers want it, and answer once this process serves it.

    Args:
        incoming: the request.
        change: makes it in a session, for whom the intent names.

    Raises:
        ConfigUnavailableError: PostgreSQL does not answer.
        IdempotencyError: the key was used for another write.
    """
    intent, key = wire.read_intent(), read_idempotency_key()
    answer = config_store().write(
        lambda session: change(session, intent), scope=principal().name, key=key, digest=incoming.digest
    )
    _catch_up(farm(), wire.epoch_of(answer))
    return wire.written(answer)


def _catch_up(here: Farm, epoch: int) -> None:
    """Wait until this process has read the epoch: who writes a model asks for it next."""
    here.snapshots.poll_soon()
    deadline = monotonic() + SEEN_WITHIN_S
    while here.served.epoch < epoch and monotonic() < deadline:
        gevent.sleep(_LOOK_EVERY_S)
