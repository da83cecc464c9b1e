"""Flat buffers in host memory: the place between a GPU and the disk.

On CPU nothing is held here: a mapped file is host memory already, and the page cache keeps what there is room for. On
a GPU the page-locked buffer of a model stays when the model leaves, and one copy brings it back.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a host of families without torch never imports it
    from workers.host.flat import FlatWeights


class HostMemory:
    """Buffers by name, the least recently used leaving first; those of tier ``memory`` leave last.

    Args:
        limit_bytes: what they may hold together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[str, tuple[FlatWeights, bool]] = OrderedDict()
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """Held now."""
        with self._lock:
            return self._bytes()

    def bring(self, name: str, find: Callable[[], "FlatWeights | None"], *, keep: bool = False) -> "FlatWeights | None":
        """The held buffer of this name, or the one that is found, from now on held; None if nothing is found.

        Args:
            name: names the buffer.
            find: brings it, page-locked, from a file.
            keep: it leaves only when nothing else can.
        """
        with self._lock:
            known = self._held.pop(name, None)
        found = known[0] if known is not None else find()
        if found is not None and found.bytes <= self._limit_bytes:
            with self._lock:
                self._held[name] = (found, keep)
                self._shrink()
        return found

    def _shrink(self) -> None:
        while self._bytes() > self._limit_bytes:
            leaves = next((name for name, (_, keep) in self._held.items() if not keep), next(iter(self._held)))
            del self._held[leaves]

    def _bytes(self) -> int:
        return sum(one.bytes for one, _ in self._held.values())
