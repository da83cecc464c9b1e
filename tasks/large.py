"""Bodies and outcomes that do not travel in a message: under a key in Redis, or, above 8 MiB, in the object store.

Without an object store Redis takes them all. Who deletes: of a body, the worker that settles its request; of a
synchronous outcome, whoever has read it. What nobody deletes has a time to live, in Redis, or is swept (``objects``).
"""

from common.errors import FarmError, ObjectStoreError
from tasks import messages
from tasks.connections import Connections
from tasks.messages import Outcome
from tasks.objects import IN_REDIS_BYTES


def put_body(connections: Connections, body: bytes, *, wanted_s: float) -> str | None:
    """Put a body into the object store, if it belongs there; its name.

    Raises:
        ObjectStoreError: the store does not answer.
    """
    if connections.objects is None or len(body) <= IN_REDIS_BYTES:
        return None
    return connections.objects.put(body, wanted_until=connections.clock.now() + wanted_s)


def drop_body(connections: Connections, name: str | None) -> None:
    """Delete the body of a request that was not published."""
    if name is not None and connections.objects is not None:
        connections.objects.delete(name)


def whole(connections: Connections, outcome: Outcome, *, is_kept: bool = False) -> Outcome:
    """The outcome itself where only its place travelled. ``is_kept``: others may come for it, too.

    Raises:
        ObjectStoreError: the store does not answer.
    """
    if outcome.ref is not None:
        return _read(connections.ask("GETDEL", outcome.ref))
    if outcome.object is None:
        return outcome
    if connections.objects is None:
        raise ObjectStoreError("the workers have an object store and this process has none: set the same for all")
    found = _read(connections.objects.get(outcome.object))
    if not is_kept:
        connections.objects.delete(outcome.object)
    return found


def _read(raw: bytes | None) -> Outcome:
    if raw is None:
        raise FarmError("the result has gone before it could be read")
    return messages.decode_outcome(raw)
