"""Waiting until every live process of a farm serves an epoch, as they tell it in Redis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Final

from common.errors import SetupError
from config_db.convergence import Epoch, has_reached
from tasks.client import FarmClient

LOOK_S: Final = 0.1
SHOWN: Final = 10


@dataclass(frozen=True)
class _Process:
    """One live process and the epoch it serves."""

    name: str
    served: Epoch


def await_epoch(redis_url: str, epoch: int, *, present: Callable[[], Epoch], timeout_s: float) -> int:
    """Wait until every live worker and web process serves this epoch or a later one; return how many there are.

    Args:
        redis_url: where they tell it.
        epoch: its number.
        present: the present epoch of the config DB.
        timeout_s: how long to wait.

    Raises:
        SetupError: some do not after ``timeout_s``; names them.
        QueueUnavailableError: Redis does not answer.
    """
    client = FarmClient(redis_url, queue_limit=1, result_ttl_s=1)  # asks only; what it could publish, these bound
    give_up_at = monotonic() + timeout_s
    try:
        while True:
            processes = _live(client)
            late = [process for process in processes if process.served.number < epoch]
            if not late:  # else the config DB need not be asked
                now = present()
                late = [process for process in processes if not has_reached(process.served, epoch, now)]
            if not late:
                return len(processes)
            if monotonic() >= give_up_at:
                raise SetupError(_told(late, processes, epoch, timeout_s))
            sleep(min(LOOK_S, max(0.0, give_up_at - monotonic())))
    finally:
        client.close()


def _live(client: FarmClient) -> list[_Process]:
    workers = [_Process(f"worker {one.node}", Epoch(one.epoch, one.epoch_id)) for one in client.workers()]
    return workers + [_Process(f"web {one.name}", Epoch(one.epoch, one.epoch_id)) for one in client.web_processes()]


def _told(late: Sequence[_Process], processes: Sequence[_Process], epoch: int, timeout_s: float) -> str:
    names = ", ".join(f"{process.name} at {process.served.number}" for process in late[:SHOWN])
    more = f" and {len(late) - SHOWN} more" if len(late) > SHOWN else ""
    share = f"{len(late)} of {len(processes)} processes"
    return f"epoch {epoch} is published, but after {timeout_s:g} s {share} do not serve it: {names}{more}"
