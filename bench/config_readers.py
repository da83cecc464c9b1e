"""Readers of the config DB that tell when each of them has an epoch: ``python -m bench.config_readers URL COUNT``."""

import sys
from threading import Event, Lock
from time import monotonic
from typing import Final

from common.logs import configure_logs
from config_db.reader import SnapshotReader
from config_db.snapshot import Snapshot

POLL_S: Final = 2.0


def main(url: str, count: int) -> None:
    """Be so many readers until the input ends; each prints every epoch and the instant at which it had it."""
    configure_logs(level="WARNING")  # to stderr
    printing, pause = Lock(), Event()

    def tell(snapshot: Snapshot) -> None:
        had_at = monotonic()
        with printing:
            print(snapshot.epoch, had_at, flush=True)

    readers = [SnapshotReader(url, poll_s=POLL_S, copy_path=None) for _ in range(count)]
    for reader in readers:
        reader.start()
        reader.subscribe(tell)
    while not all(reader.is_listening for reader in readers):
        pause.wait(0.01)
    print("listening", flush=True)
    sys.stdin.read()
    for reader in readers:
        reader.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
