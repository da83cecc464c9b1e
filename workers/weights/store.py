"""Weights on this machine's disk: published folders, what is under way, who uses what, and which leave next.

Under one directory, shared by all processes of the machine::

    hub/<repository>/<commit>/   manifest.json, files/          published by one rename, whole and verified
    bucket/<digest of URI>/      manifest.json, files/
    refs/<repository>/<name>     the commit a branch or tag had when it was first asked for
    partial/<digest>/            a fetch under way, or one that died; never read by a model
    locks/                       kernel locks; the time of a lease's file is that of the last use
    trash/                       renamed away, about to be deleted

Owns the layout and the space. Where files come from is for ``resolve``.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Final
from urllib.parse import quote
from uuid import uuid4

import msgspec

from common.logs import get_logger
from workers.weights import leases
from workers.weights.failures import failure
from workers.weights.leases import Files
from workers.weights.manifest import Manifest

log = get_logger("host")

MANIFEST: Final = "manifest.json"
FILES: Final = "files"
OWNER: Final = "owner"
OWED: Final = "owed"
"""Marks an entry that the bucket has not got yet."""
ROOM_WAIT_S: Final = 60.0
_BLOCK_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """One published folder. ``used_at`` is in seconds since the epoch of the clock of this machine's files."""

    place: str
    manifest: Manifest
    used_at: float
    in_use: bool

    @property
    def bytes(self) -> int:
        return self.manifest.bytes


def hub_place(repository: str, commit: str) -> str:
    """Where a repository's commit lies."""
    return f"hub/{quote(repository, safe='')}/{commit}"


def bucket_place(uri: str) -> str:
    """Where a bucket's folder lies."""
    return f"bucket/{_short(uri)}"


class Store:
    """The store in one directory.

    Args:
        fill: share of the disk above which the least recently used leave.
        max_bytes: what the store may hold; None: what the disk holds.
    """

    def __init__(self, directory: Path, *, fill: float = 1.0, max_bytes: int | None = None) -> None:
        self.directory = directory
        self._fill = fill
        self._max_bytes = max_bytes

    # -- what is there -----------------------------------------------------------------------------------------------

    def has(self, place: str) -> bool:
        """Whether a folder is published."""
        return (self.directory / place).exists()

    def find(self, place: str) -> Files | None:
        """The published folder, leased; None if it is not there, or is damaged and was removed."""
        folder = self.directory / place
        if not self.has(place):
            return None
        files = Files(folder / FILES, leases.share(self._lease(place)))
        manifest = self.manifest(place)
        if manifest is not None and _has_all(folder / FILES, manifest):
            self._use(place)
            return files
        files.release()
        if folder.exists():
            log.error("weights_damaged", place=place, removed=self.remove(place))
        return None

    def manifest(self, place: str) -> Manifest | None:
        """What a published folder holds; None if it is not there."""
        try:
            return msgspec.json.decode((self.directory / place / MANIFEST).read_bytes(), type=Manifest)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def ref(self, repository: str, name: str) -> str | None:
        """The commit that a branch or tag has on this machine."""
        with suppress(FileNotFoundError):
            return self._ref(repository, name).read_text() or None
        return None

    def set_ref(self, repository: str, name: str, commit: str) -> None:
        """Keep the commit of a branch or tag."""
        path = self._ref(repository, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{uuid4().hex}")
        fresh.write_text(commit)
        fresh.replace(path)

    def entries(self) -> list[Entry]:
        """Everything published, least recently used first."""
        folders = [*self.directory.glob("hub/*/*"), *self.directory.glob("bucket/*")]
        found = [self._entry(str(folder.relative_to(self.directory))) for folder in folders]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used_at)

    def owes(self, place: str) -> bool:
        """Whether the bucket has not got it yet."""
        return (self.directory / place / OWED).exists()

    def settle(self, place: str) -> None:
        """The bucket has it now."""
        (self.directory / place / OWED).unlink(missing_ok=True)

    # -- fetching ----------------------------------------------------------------------------------------------------

    @contextmanager
    def fetching(self, name: str, *, deadline: float) -> Iterator[None]:
        """Be the one process of this machine that fetches it; TimeoutError if another still does at the deadline."""
        with leases.alone(self._locks / f"{_short(name)}.fetch", deadline=deadline):
            yield

    def partial(self, place: str, *, owner: str) -> Path:
        """Where a fetch under way keeps what it has; what an earlier one left is still there.

        ``owner`` is the name it holds with ``fetching``.
        """
        folder = self._partial(place)
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        (folder / OWNER).write_text(owner)
        return folder

    def publish(self, place: str, manifest: Manifest, *, owed: bool) -> None:
        """Make a partial folder, whole and verified, the published one. By the process that is fetching it."""
        partial, folder = self._partial(place), self.directory / place
        for left in [path for path in partial.iterdir() if path.name != FILES]:
            left.unlink()
        (partial / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        if owed:
            (partial / OWED).touch()
        _sync(partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._use(place)
        partial.rename(folder)
        _sync(folder.parent)

    @contextmanager
    def making_room(self, needed_bytes: int) -> Iterator[None]:
        """Free what is needed and keep others from counting on the same space until the block has claimed it.

        Raises:
            ModelLoadError: there is not the space, and no more can be freed.
        """
        with leases.alone(self._locks / "room", deadline=monotonic() + ROOM_WAIT_S):
            self.make_room(needed_bytes)
            yield

    def make_room(self, needed_bytes: int) -> list[Entry]:
        """Remove the least recently used, and no more than are needed; returns those."""
        removed: list[Entry] = []
        if self.excess_bytes(needed_bytes) > 0:
            self.sweep()
        for entry in self.entries() if self.excess_bytes(needed_bytes) > 0 else ():
            if self.excess_bytes(needed_bytes) <= 0:
                break
            if self.remove(entry.place):
                log.info("weights_evicted", source=entry.manifest.source, freed_bytes=entry.bytes, wanted=needed_bytes)
                removed.append(entry)
        self._check_room(needed_bytes)
        return removed

    def remove(self, place: str) -> bool:
        """Delete a published folder; false if it is in use, or not there."""
        lock = leases.take(self._lease(place))
        if lock is None:
            return False
        try:
            trash = self.directory / "trash" / uuid4().hex
            trash.parent.mkdir(parents=True, exist_ok=True)
            (self.directory / place).rename(trash)
        except FileNotFoundError:
            return False
        finally:
            os.close(lock)
        shutil.rmtree(trash)
        return True

    def sweep(self) -> None:
        """Remove what dead processes have left: trash, and fetches nobody has gone on with."""
        for folder in self.directory.glob("trash/*"):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self.directory.glob("partial/*"):
            owner = folder / OWNER
            name = owner.read_text() if owner.exists() else ""
            lock = leases.take(self._locks / f"{_short(name)}.fetch") if name else None
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)

    def clear_partial(self, place: str) -> None:
        """Forget what a fetch has so far. By the process that is fetching it."""
        shutil.rmtree(self._partial(place), ignore_errors=True)

    # -- space -------------------------------------------------------------------------------------------------------

    def held_bytes(self) -> int:
        """On disk, partial folders included."""
        paths = (path for name in ("hub", "bucket", "partial") for path in (self.directory / name).rglob("*"))
        return sum(disk_bytes(path) for path in paths)

    def excess_bytes(self, needed_bytes: int) -> float:
        """Bytes over the threshold, or the bound, once what is needed has come."""
        disk = self._disk()
        over_fill = disk.total - disk.free + needed_bytes - self._fill * disk.total
        return max(over_fill, self.held_bytes() + needed_bytes - self._max_bytes) if self._max_bytes else over_fill

    def _check_room(self, needed_bytes: int) -> None:
        """The threshold gives way to files of others; the disk's end and the store's own bound do not."""
        free = self._disk().free
        if self._max_bytes is not None:
            free = min(free, self._max_bytes - self.held_bytes())
        if needed_bytes > free:
            raise failure(
                f"its files need {needed_bytes} bytes on this worker's disk and {max(0, free)} can be had: "
                "what else is there is in use",
                "STORAGE",
                permanent=False,
                remedy="free space, raise FARMHAND_WEIGHTS_MAX_BYTES, or set FARMHAND_WEIGHTS_DIR to a larger disk",
            )

    def _disk(self) -> "shutil._ntuple_diskusage":
        self.directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.directory)

    # -- names -------------------------------------------------------------------------------------------------------

    @property
    def _locks(self) -> Path:
        return self.directory / "locks"

    def _partial(self, place: str) -> Path:
        return self.directory / "partial" / _short(place)

    def _lease(self, place: str) -> Path:
        return self._locks / f"{_short(place)}.lease"

    def _use(self, place: str) -> Path:
        """Note that it is used now: the kernel's own time of a file is too coarse to tell two uses apart."""
        path, now = self._lease(place), datetime.now(UTC).timestamp()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (now, now))
        return path

    def _ref(self, repository: str, name: str) -> Path:
        return self.directory / "refs" / quote(repository, safe="") / quote(name, safe="")

    def _entry(self, place: str) -> Entry | None:
        manifest = self.manifest(place)
        if manifest is None:
            return None
        path = self._lease(place)
        lock = leases.take(path if path.exists() else self._use(place))
        if lock is not None:
            os.close(lock)
        return Entry(place, manifest, self._lease(place).stat().st_mtime, in_use=lock is None)


def disk_bytes(path: Path) -> int:
    """What a file takes on disk; nothing for one that is not there."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        return 0 if path.is_dir() else status.st_blocks * _BLOCK_BYTES
    return 0


def _has_all(files: Path, manifest: Manifest) -> bool:
    """Whether every file is there at its size."""
    try:
        return all((files / file.name).stat().st_size == file.size for file in manifest.files)
    except FileNotFoundError:
        return False


def _sync(*paths: Path) -> None:
    """Have the disk keep these across a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _short(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:32]
