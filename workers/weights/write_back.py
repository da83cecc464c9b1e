"""Gives the bucket what a worker had to fetch from the Hub, beside serving: in a thread, and later if it fails now.

An entry of the store is marked as owed until its manifest, which is written last, stands in the bucket.
"""

from threading import Lock, Thread
from time import monotonic
from typing import Final

import msgspec

from common.errors import FarmError
from common.logs import get_logger
from workers.weights.bucket import Bucket
from workers.weights.cluster_lease import ClusterLease
from workers.weights.failures import DamagedError, PassingError, said
from workers.weights.store import FILES, MANIFEST, Store

log = get_logger("host")

AGAIN_S: Final = 60.0


class WriteBacks:
    """Those of one process; owns which are under way and when each was last begun."""

    def __init__(self, store: Store, bucket: Bucket, *, lease_s: float) -> None:
        self._store = store
        self._bucket = bucket
        self._lease_s = lease_s
        self._lock = Lock()
        self._begun_at: dict[str, float] = {}
        self._running: list[Thread] = []

    def begin(self, place: str, folder: str, lease: ClusterLease | None) -> None:
        """Write an entry back in a thread; a lease that is held already is released afterwards."""
        thread = Thread(target=self._write, args=(place, folder, lease), name="weights-write-back", daemon=True)
        with self._lock:
            self._begun_at[place] = monotonic()
            self._running = [*(one for one in self._running if one.is_alive()), thread]
        thread.start()

    def begin_owed(self, place: str, folder: str) -> None:
        """Try again what was not written back; not more often than every minute."""
        if self._store.owes(place) and monotonic() - self._begun_at.get(place, -AGAIN_S) >= AGAIN_S:
            self.begin(place, folder, None)

    def wait(self) -> None:
        """Until all that were begun have ended."""
        for thread in list(self._running):
            thread.join()

    def _write(self, place: str, folder: str, lease: ClusterLease | None) -> None:
        held = lease or ClusterLease(self._bucket, f"{folder}lease", life_s=self._lease_s)
        try:
            files = self._store.find(place)
            if files is None or (lease is None and self._is_anothers(held)):
                return
            with files:
                self._upload(place, folder)
            log.info("weights_written_back", place=place)
        except (PassingError, DamagedError, FarmError, OSError) as error:
            log.warning("weights_not_written_back", place=place, error=said(error), again_in_s=AGAIN_S)
        finally:
            held.release()

    def _is_anothers(self, lease: ClusterLease) -> bool:
        """Whether somebody else holds the lease; a server that knows no conditions has none."""
        try:
            return not lease.acquire()
        except PassingError:
            return False

    def _upload(self, place: str, folder: str) -> None:
        manifest = self._store.manifest(place)
        if manifest is None:
            return
        if self._bucket.manifest(folder) != manifest:
            for file in manifest.files:
                self._bucket.upload(self._store.directory / place / FILES / file.name, f"{folder}{FILES}/{file.name}")
            self._bucket.put(f"{folder}{MANIFEST}", msgspec.json.encode(manifest))
        self._store.settle(place)
