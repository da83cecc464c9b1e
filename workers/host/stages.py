"""The board: a page of memory shared by one host and its worker, on which the host notes what each thread is doing.

It says, after a sudden death, which micro-batches were being worked on, and lets the worker's watchdog see a hang even
while its event loop is blocked. Noting costs a few stores and no system call, so it can be done at every step.

Each slot belongs to one thread of the host, which alone writes it: stage, micro-batch, spec number, since when. The
stage is written last and cleared first, so that a reader never takes one micro-batch for another.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from time import monotonic
from typing import Final

_WORDS: Final = 4
_BYTES: Final = 8
BOARD_BYTES: Final = mmap.PAGESIZE
EXIT_DEVICE_LOST: Final = 70
"""A host's exit status when its device is of no use to it any more."""


class Slot(IntEnum):
    """The threads of a host."""

    READER = 0
    LOADER = 1
    COMPUTE = 2


class Stage(IntEnum):
    """What a thread is doing."""

    IDLE = 0
    LOAD = 1
    PREPARE = 2
    COMPUTE = 3


@dataclass(frozen=True, slots=True)
class Doing:
    """One thread's note. ``batch`` is 0 for a load that no micro-batch waits for; ``since`` is monotonic seconds."""

    stage: Stage
    batch: int
    spec_number: int
    since: float


def create_board() -> int:
    """The descriptor of a new, empty board."""
    descriptor = os.memfd_create("farmhand-board", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, BOARD_BYTES)
    return descriptor


class Board:
    """A mapped board; the descriptor may be closed afterwards. CLOCK_MONOTONIC is one clock for all processes."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, BOARD_BYTES)
        self._ids = memoryview(self._map).cast("Q")
        self._times = memoryview(self._map).cast("d")

    @contextmanager
    def noted(self, slot: Slot, stage: Stage, *, batch: int = 0, spec_number: int = 0) -> Iterator[None]:
        """Show this stage for the length of the block; what was shown before is shown again afterwards."""
        before = self.read(slot)
        self._write(slot, Doing(stage, batch, spec_number, monotonic()))
        try:
            yield
        finally:
            self._write(slot, before)

    def read(self, slot: Slot) -> Doing:
        """What the slot's thread is doing."""
        base = slot * _WORDS
        return Doing(Stage(self._ids[base]), self._ids[base + 1], self._ids[base + 2], self._times[base + 3])

    def doing(self) -> list[Doing]:
        """What the host is doing now, without idle threads."""
        notes = (self.read(slot) for slot in Slot)
        return [note for note in notes if note.stage is not Stage.IDLE]

    def close(self) -> None:
        """Unmap."""
        self._ids.release()
        self._times.release()
        self._map.close()

    def _write(self, slot: Slot, note: Doing) -> None:
        base = slot * _WORDS
        self._ids[base] = Stage.IDLE
        self._times[base + 3] = note.since
        self._ids[base + 1] = note.batch
        self._ids[base + 2] = note.spec_number
        self._ids[base] = note.stage
