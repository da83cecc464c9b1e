"""Takes away the rows of pools whose lease has run out.

Such a pool counts for nothing anywhere, so nobody waits for this. Every web process sweeps; whichever comes first
deletes, under the lock of the epoch row, and the others find nothing to do. Without a web process the rows stay.
"""

import random
import threading
from datetime import UTC, datetime
from typing import Final

from common.errors import ConfigUnavailableError
from common.logs import get_logger
from config_db import pools
from config_db.reader import SnapshotReader
from webapp.config_store import ConfigStore

log = get_logger("webapp")

EVERY_S: Final = 5.0
JITTER: Final = 0.5
"""Processes look at different times: mostly one has swept before the next one looks."""


class PoolSweeps:
    """A thread that looks at the snapshot now and then, and writes only if something in there has run out.

    Args:
        reader: the config of this process; started.
        store: by which it deletes.
    """

    def __init__(self, reader: SnapshotReader, store: ConfigStore) -> None:
        self._reader = reader
        self._store = store
        self._never = threading.Event()

    def start(self) -> None:
        """Sweep from now on, until the process ends."""
        threading.Thread(target=self._run, name="pool-sweeps", daemon=True).start()

    def _run(self) -> None:
        while not self._never.wait(EVERY_S * random.uniform(1 - JITTER, 1 + JITTER)):  # noqa: S311 - no secret
            now = datetime.now(UTC)
            if any(spec.is_expired(now) for spec in self._reader.current.pools.values()):
                self._sweep()

    def _sweep(self) -> None:
        try:
            with self._store.change() as session:
                swept = pools.sweep(session, actor="farmhand")
        except ConfigUnavailableError:
            return  # the next one comes soon
        except Exception:
            log.exception("pools_not_swept")
            return
        if swept:
            log.info("pools_swept", pools=swept)
