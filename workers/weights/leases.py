"""Holds on files of this machine, as kernel locks: they end with the process that holds them, however it ends.

A *shared* hold is a lease: the files are in use and stay. An *exclusive* one is for who fetches or removes.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from time import monotonic
from types import TracebackType
from typing import Final, Self
from weakref import finalize

_LOOK_S: Final = 0.05


class Files:
    """A model's folder, leased until the block ends; or, after ``keep_for``, as long as what uses it exists."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """End the lease, unless it was handed on."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def keep_for(self, user: object) -> None:
        """Hand the lease on to what maps the files; it ends with that object.

        An object that cannot be referred to weakly keeps the files for the life of this process.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if hasattr(user, "__weakref__"):
            finalize(user, os.close, descriptor).atexit = False


def share(lock: Path) -> int:
    """Hold a lock with others; waits while it is held exclusively, which is never for long. Returns its descriptor."""
    return _locked(lock, fcntl.LOCK_SH)


def take(lock: Path) -> int | None:
    """Hold a lock alone; None if anybody holds it."""
    try:
        return _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


@contextmanager
def alone(lock: Path, *, deadline: float) -> Iterator[None]:
    """Hold a lock alone for the length of the block; TimeoutError if it is not free by the deadline."""
    while (descriptor := take(lock)) is None:
        if monotonic() > deadline:
            raise TimeoutError(f"{lock} is held by another process")
        Event().wait(_LOOK_S)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(lock: Path, operation: int) -> int:
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
