"""Tells the farm which epoch this web process serves, so that anybody can see when a change has reached everyone.

And how many requests a second it gets.
"""

import threading
from time import monotonic
from typing import Final

from common.errors import QueueUnavailableError
from common.logs import get_logger
from config_db.reader import SnapshotReader
from tasks.client import FarmClient

log = get_logger("webapp")

EVERY_S: Final = 3.0


class EpochReports:
    """A thread that tells at once of every new epoch, and otherwise often enough to count as alive.

    Args:
        client: by which it tells.
        reader: the config of this process; started.
        machine_profile: what this process sends requests to unless told otherwise.
    """

    def __init__(self, client: FarmClient, reader: SnapshotReader, *, machine_profile: str) -> None:
        self._client = client
        self._reader = reader
        self._machine_profile = machine_profile
        self._is_due = threading.Event()
        self._told_at = monotonic()
        self._told_requests = 0

    def start(self) -> None:
        """Tell from now on, until the process ends."""
        self._reader.subscribe(lambda _: self._is_due.set())
        threading.Thread(target=self._run, name="epoch-reports", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._tell()
            self._is_due.wait(EVERY_S)
            self._is_due.clear()

    def _tell(self) -> None:
        config = self._reader.current
        try:
            self._client.tell(
                machine_profile=self._machine_profile,
                epoch=config.epoch,
                epoch_id=str(config.epoch_id),
                requests_per_s=self._rate(),
            )
        except QueueUnavailableError:
            return  # nobody could read it; the next try comes soon
        except Exception:  # Redis refuses, as one that is read-only for a while does
            log.exception("epoch_not_told")

    def _rate(self) -> float:
        """Requests a second since this was asked last."""
        now, requests = monotonic(), self._client.requests
        rate = (requests - self._told_requests) / max(now - self._told_at, 1e-3)
        self._told_at, self._told_requests = now, requests
        return round(rate, 3)
