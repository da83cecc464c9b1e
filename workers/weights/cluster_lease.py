"""The right to be the one worker of the cluster that fetches a model from the Hub: an object in the bucket.

It stands beside what it guards, so it needs nothing that a worker with a bucket has not got: hosts hold no connection
to Redis, and a prefetch runs without a farm. Only efficiency rests on it. What is written is named by its digest and
published last, so two holders (a server that ignores conditions, a holder that slept) merely do the work twice.
"""

import socket
from threading import Event, Thread
from typing import Final
from uuid import uuid4

import msgspec

from common.errors import FarmError
from common.logs import get_logger
from workers.weights.bucket import Bucket
from workers.weights.failures import PassingError, said

log = get_logger("host")

RENEWALS_PER_LIFE: Final = 3


class ClusterLease:
    """One try at the lease; while it is held, a thread renews it.

    Args:
        key: of the object.
        life_s: a lease that was not renewed for so long belongs to the dead, by the bucket's own clock.
    """

    def __init__(self, bucket: Bucket, key: str, *, life_s: float) -> None:
        self._bucket = bucket
        self._key = key
        self._life_s = life_s
        self._holder = f"{socket.gethostname()} {uuid4().hex}"
        self._beats = 0
        self._etag: str | None = None
        self._ended = Event()
        self._renewing = Thread(target=self._renew, name="weights-lease", daemon=True)

    def acquire(self) -> bool:
        """Take it if nobody alive holds it; PassingError if the bucket does not say."""
        seen = self._bucket.get(self._key)
        if seen is not None and seen.age_s <= self._life_s:
            return False
        self._etag = self._bucket.put_if(self._key, self._content(), etag=seen.etag if seen else None)
        if self._etag is None:
            return False
        if seen is not None:
            log.warning("weights_lease_taken_over", key=self._key, silent_s=seen.age_s)
        self._renewing.start()
        return True

    def release(self) -> None:
        """Give it up, if it is held."""
        self._ended.set()
        if self._renewing.ident is not None:
            self._renewing.join()
        if self._etag is None:
            return
        try:
            self._bucket.delete(self._key)
        except (PassingError, FarmError) as error:
            log.warning("weights_lease_left", key=self._key, error=said(error))

    def _renew(self) -> None:
        while not self._ended.wait(self._life_s / RENEWALS_PER_LIFE):
            try:
                etag = self._bucket.put_if(self._key, self._content(), etag=self._etag)
            except (PassingError, FarmError) as error:
                log.warning("weights_lease_not_renewed", key=self._key, error=said(error))
                continue
            self._etag = etag
            if etag is None:  # taken over: this process was taken for dead
                return

    def _content(self) -> bytes:
        self._beats += 1
        return msgspec.json.encode({"holder": self._holder, "beats": self._beats})
