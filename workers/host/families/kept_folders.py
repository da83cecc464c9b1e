"""What outlives the eviction of models: everything that was read of their folders and found out about them."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from config_db.spec import ModelSpec
from workers.host import precision
from workers.host.families.protocol import Device
from workers.host.families.text_folder import content_key

KEPT_FOLDERS: Final = 256
K = TypeVar("K")


class Recent(Generic[K]):
    """What was read of the folders used last; owned by the loader thread of one host.

    Args:
        read: reads a folder.
    """

    def __init__(self, read: Callable[[ModelSpec, Path], K]) -> None:
        self._read = read
        self._kept: OrderedDict[tuple[str, str], K] = OrderedDict()

    def recall(self, spec: ModelSpec, files: Path) -> K:
        """What is kept of a folder, as this spec reads it, else what is read now."""
        key = content_key(spec, files)
        if key not in self._kept:
            self._kept[key] = self._read(spec, files)
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT_FOLDERS:
            self._kept.popitem(last=False)
        return self._kept[key]

    def known(self, spec: ModelSpec, files: Path) -> K | None:
        """What is kept of a folder, if anything is."""
        return self._kept.get(content_key(spec, files))


class Found(Protocol):
    """What the first load of a folder found out."""

    @property
    def precision(self) -> str:
        """A name of ``precision.DTYPES``."""


class Tried(Protocol):
    """What is kept of a folder whose precision is found by trying."""

    @property
    def verdict(self) -> Found | None:
        """None before the first load."""


T = TypeVar("T", bound=Tried)


def estimate_bytes(kept: Recent[T], spec: ModelSpec, files: Path, weights: Iterable[Path]) -> int:
    """The size of weight files, halved where the model runs in half precision, as far as is known."""
    known = kept.known(spec, files)
    if known is not None and known.verdict is not None:
        found = known.verdict.precision
    else:
        found = precision.quick(Device()) if spec.precision == "auto" else spec.precision
    size = sum(path.stat().st_size for path in weights)
    return size // 2 if found != "float32" else size
