"""The web processes that live now, as they tell of themselves in Redis, and which config each of them serves."""

import os
import socket
from dataclasses import dataclass
from typing import Final

import msgspec

from tasks import names
from tasks.connections import Connections

LIFE_S: Final = 10.0
"""A web process that has told nothing for so long is gone."""
TELL: Final = "redis.call('HDEL', KEYS[1], ARGV[1]) return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])"
"""A script that begins by removing is accepted by a full Redis; a plain HSET is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebView:
    """What a live web process tells of itself: ``<host>:<process id>``, and the epoch of the config it serves.

    ``requests_per_s`` is what it was asked for lately.
    """

    name: str
    machine_profile: str
    epoch: int
    epoch_id: str
    requests_per_s: float = 0.0


class _Told(msgspec.Struct, kw_only=True):
    name: str
    machine_profile: str = ""
    epoch: int = 0
    epoch_id: str = ""
    requests_per_s: float = 0.0
    told_at: float
    """On the farm clock."""


def tell(
    connections: Connections, *, machine_profile: str, epoch: int, epoch_id: str, requests_per_s: float = 0.0
) -> None:
    """Say that this process lives and what it serves, for ``LIFE_S``.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """
    told = _Told(
        name=f"{socket.gethostname()}:{os.getpid()}",
        machine_profile=machine_profile,
        epoch=epoch,
        epoch_id=epoch_id,
        requests_per_s=requests_per_s,
        told_at=connections.clock.now(),
    )
    connections.ask("EVAL", TELL, 1, names.WEB_PROCESSES, connections.process, msgspec.json.encode(told))


def live_web_processes(connections: Connections) -> list[WebView]:
    """The web processes that have told of themselves lately; QueueUnavailableError if Redis does not answer."""
    told: dict[bytes, bytes] = connections.ask("HGETALL", names.WEB_PROCESSES)
    oldest = connections.clock.now() - LIFE_S
    read = {process: _read(text) for process, text in told.items()}
    live = [found for found in read.values() if found is not None and found.told_at >= oldest]
    # long gone, so that none which has told again since is taken for it; what a newer release tells is its own affair
    gone = [process for process, found in read.items() if found is not None and found.told_at < oldest - 10 * LIFE_S]
    if gone:
        connections.ask("HDEL", names.WEB_PROCESSES, *gone)
    return [
        WebView(
            name=one.name,
            machine_profile=one.machine_profile,
            epoch=one.epoch,
            epoch_id=one.epoch_id,
            requests_per_s=one.requests_per_s,
        )
        for one in live
    ]


def _read(text: bytes) -> _Told | None:
    """What a process has told; None if it cannot be read."""
    try:
        return msgspec.json.decode(text, type=_Told)
    except msgspec.DecodeError:
        return None
