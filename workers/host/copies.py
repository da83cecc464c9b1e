"""Weights as they run, kept on this machine: converted once, mapped by every host that wants them afterwards.

A copy is one flat file, named by a digest of what it was made of, beside which a note says how the model is run. It
is published by a rename, so that nobody sees half of one. Losing a copy costs a conversion, no more: they are bounded
by the least recently used, whoever maps one that is removed keeps its pages, and what cannot be written is not kept.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Condition, Lock, Thread, get_native_id
from time import monotonic
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import msgspec

from common.logs import get_logger

if TYPE_CHECKING:  # a host of families without torch never imports it
    import torch

    from workers.host.flat import FlatWeights

log = get_logger("host")

FREE_BYTES: Final = 2**30
"""So much of the disk is left to others."""
WRITE_AFTER_S: Final = 0.25
"""What a load was waited for is answered first, and further loads that come this soon after it."""
BURST_S: Final = 2.0
"""Loads that go on for longer than this have their copies written beside them."""
NICE: Final = 15
"""Of the thread that writes: on Linux a thread has a niceness of its own."""
STALE_S: Final = 3600.0
"""A part of a copy that old was left behind by a host that died."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What is to be written, and what is called once it is there."""

    tensors: Mapping[str, "torch.Tensor"]
    note: str
    then: Callable[[], None]


class Copies:
    """The copies of one machine; several hosts use one directory at once.

    Args:
        directory: where they lie.
        limit_bytes: what they may hold together.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._writing = Lock()
        self._changed = Condition()
        self._pending: dict[str, Callable[[], Draft | None]] = {}
        self._again: set[str] = set()
        self._has_writer = False
        self._asked_at = 0.0

    def find(self, name: str) -> "FlatWeights | None":
        """A kept copy, mapped, and used last from now on; None if there is none, or it is damaged."""
        from workers.host import flat

        path = self._path(name)
        try:
            found = flat.mapped(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, msgspec.DecodeError) as error:
            log.warning("copy_refused", path=str(path), error=str(error))
            with suppress(OSError):
                path.unlink()
            return None
        return found

    def keep_soon(self, name: str, make: Callable[[], "Draft | None"]) -> None:
        """Write a copy beside whatever else goes on, each in its turn.

        One whose model comes again before its turn, or had left by then, goes first and waits for no burst.

        Args:
            name: names the copy.
            make: asked for its content when its turn has come, so that what waits keeps no memory; None: it is not
                wanted any more. The one that was given last counts.
        """
        with self._changed:
            if name in self._pending:
                self._again.add(name)
            self._pending[name] = make
            self._asked_at = monotonic()
            self._changed.notify()
            if not self._has_writer:
                self._has_writer = True
                Thread(target=self._write_pending, name="copies", daemon=True).start()

    def _write_pending(self) -> None:
        """Until nothing is left to be written; whoever loads or computes goes first."""
        with suppress(OSError):  # who was started with a larger niceness may not lower it
            os.setpriority(os.PRIO_PROCESS, get_native_id(), NICE)
        until = monotonic() + BURST_S
        while (turn := self._next(until)) is not None:
            name, make = turn
            has_left = False
            try:
                has_left = not self._write(name, make)
            except Exception as error:  # noqa: BLE001 - whatever it is, it costs a copy and no more
                log.warning("copy_not_kept", copy=name, error=repr(error)[:200])
            with self._changed:
                if self._pending[name] is make:  # else its model has come again meanwhile
                    del self._pending[name]
                (self._again.add if has_left else self._again.discard)(name)

    def _next(self, until: float) -> "tuple[str, Callable[[], Draft | None]] | None":
        """Whose turn it is, once it has come; None, and the thread has ended, if nothing is left."""
        with self._changed:
            while self._pending:
                name = next((one for one in self._pending if one in self._again), None)
                wait_s = min(self._asked_at + WRITE_AFTER_S, until) - monotonic()
                if name is None and wait_s <= 0:
                    name = next(iter(self._pending))
                if name is not None:
                    return name, self._pending[name]
                self._changed.wait(wait_s)
            self._has_writer = False
            return None

    def _write(self, name: str, make: "Callable[[], Draft | None]") -> bool:
        """False: it is not wanted any more."""
        draft = make()
        if draft is None:
            return False
        is_kept, then = self.keep(name, draft.tensors, draft.note), draft.then
        del draft  # what is told may let go of the tensors, and give their memory back
        if is_kept:
            then()
        return True

    def keep(self, name: str, tensors: Mapping[str, "torch.Tensor"], note: str) -> bool:
        """Write a copy and remove what it displaces; whether it is there now."""
        from workers.host import flat

        path, size = self._path(name), sum(tensor.nbytes for tensor in tensors.values())
        with self._writing:  # one at a time: a sweep over all models must not hold them all in memory
            if path.exists():
                return True
            part = self._directory / f".{name}.{uuid4().hex}.part"
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                if not self._has_room(size):
                    return False
                flat.write(part, tensors, note)
                part.rename(path)
            except OSError as error:
                log.warning("copy_not_kept", path=str(path), error=str(error))
                with suppress(OSError):
                    part.unlink()
                return False
        return True

    def _has_room(self, size: int) -> bool:
        """Remove the least recently used until this fits; false where it would not."""
        kept = sorted((found.st_mtime, found.st_size, path) for path, found in self._kept())
        held = sum(one[1] for one in kept)
        if size > self._limit_bytes or shutil.disk_usage(self._directory).free - size < FREE_BYTES:
            log.info("copy_not_kept", bytes=size, limit_bytes=self._limit_bytes)
            return False
        while kept and held + size > self._limit_bytes:
            _, freed, path = kept.pop(0)
            with suppress(FileNotFoundError):
                path.unlink()
            held -= freed
            log.info("copy_removed", copy=path.stem, freed_bytes=freed, for_bytes=size)
        return True

    def _kept(self) -> list[tuple[Path, os.stat_result]]:
        """Whole copies; parts that a dead host has left are removed."""
        found: list[tuple[Path, os.stat_result]] = []
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".safetensors":
                    found.append((path, status))
                elif path.suffix == ".part" and datetime.now(UTC).timestamp() - status.st_mtime > STALE_S:
                    path.unlink()
        return found

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"
