"""Fetches the files of one folder: in parts, several at once, gone on with after whatever broke it off, verified.

Owns a partial folder while it works. A part that is whole is noted in a journal, so that after a death only the parts
under way are fetched again. Where bytes come from is a ``Remote``.
"""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from time import monotonic
from typing import Final, Protocol

import msgspec

from common.errors import ModelLoadError
from workers.weights.failures import PassingError, failure, said, storage_failure
from workers.weights.manifest import RemoteFile, verify
from workers.weights.store import FILES

ATTEMPTS: Final = 5
"""So often in a row a part may fail without a byte having come."""
BACK_OFF_S: Final = (0.2, 0.5, 1.0, 2.0)
PLAN: Final = "plan.json"
JOURNAL: Final = "journal"
OnProgress = Callable[[int, int], None]
"""Told bytes that are here and bytes in all, from any thread."""


class Remote(Protocol):
    """Where files come from."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def read(self, file: RemoteFile, start: int, stop: int) -> Generator[bytes]:
        """The bytes from ``start`` to ``stop``; PassingError for what may succeed soon, ModelLoadError for the rest.

        A generator, so that what its reader raises, as when the disk is full, is not taken for the remote's failure.
        """


@dataclass(frozen=True, slots=True)
class _Part:
    file: int
    start: int
    stop: int

    @property
    def note(self) -> str:
        return f"{self.file} {self.start} {self.stop}"


@dataclass(slots=True)
class _Open:
    """A file being written."""

    file: RemoteFile
    path: Path
    descriptor: int
    parts: list[_Part] = field(default_factory=list)


class Fetch:
    """One fetch into a partial folder.

    Args:
        folder: the partial folder.
        deadline: when to give up, on the clock of ``time.monotonic``.
        on_progress: told as bytes come.
    """

    def __init__(
        self,
        remote: Remote,
        files: Sequence[RemoteFile],
        folder: Path,
        *,
        deadline: float,
        part_bytes: int,
        connections: int,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._remote = remote
        self._files = files
        self._folder = folder
        self._deadline = deadline
        self._part_bytes = part_bytes
        self._connections = connections
        self._on_progress = on_progress
        self._lock = Lock()
        self._cancelled = Event()
        self._here = 0
        self._done = self._read_journal()

    @property
    def missing_bytes(self) -> int:
        """What is still to be written to disk."""
        held = sum(self._path(file).stat().st_size for file in self._files if self._path(file).exists())
        return max(0, sum(file.size for file in self._files) - held)

    def claim(self) -> None:
        """Take the disk space of all files; OSError if there is not as much."""
        for file in self._files:
            path = self._path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as out:
                if file.size:
                    os.posix_fallocate(out.fileno(), 0, file.size)

    def run(self) -> list[RemoteFile]:
        """Fetch what is missing; returns the files with the digests that were verified.

        Raises:
            ModelLoadError: the remote does not give them, or not in time, or the disk does not take them.
            DamagedError: what came is not what was promised.
        """
        opened = [self._open(number, file) for number, file in enumerate(self._files)]
        try:
            self._run_parts(opened)
            return self._verify(opened)
        except OSError as error:
            raise storage_failure(error, self._folder) from error
        finally:
            for one in opened:
                os.close(one.descriptor)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _run_parts(self, opened: list[_Open]) -> None:
        todo = [(one, part) for one in opened for part in one.parts if part.note not in self._done]
        self._here = sum(one.file.size for one in opened) - sum(part.stop - part.start for _, part in todo)
        self._tell(0)
        with ThreadPoolExecutor(self._connections, thread_name_prefix="weights") as pool:
            waiting = [pool.submit(self._fetch_part, one, part) for one, part in todo]
            try:
                for future in as_completed(waiting):
                    future.result()
            except BaseException:
                self._cancelled.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _fetch_part(self, one: _Open, part: _Part) -> None:
        at, attempt = part.start, 0
        while at < part.stop:
            came, trouble = self._read_some(one, at, part.stop)
            at += came
            attempt = 1 if came else attempt + 1
            if at < part.stop:
                self._pause(one.file, trouble, attempt)
        self._note(part.note)

    def _read_some(self, one: _Open, at: int, stop: int) -> tuple[int, PassingError]:
        """Write what comes of a part; returns how much that was, and why it ended."""
        came = 0
        try:
            with closing(self._remote.read(one.file, at, stop)) as chunks:
                for chunk in chunks:
                    useful = chunk[: stop - at - came]
                    os.pwrite(one.descriptor, useful, at + came)
                    came += len(useful)
                    self._tell(len(useful))
                    self._check(one.file)
        except PassingError as error:
            return came, error
        return came, PassingError("it broke off")

    def _pause(self, file: RemoteFile, trouble: PassingError, attempt: int) -> None:
        """Wait before the next attempt; ModelLoadError where there is none."""
        wait_s = trouble.wait_s if trouble.wait_s is not None else BACK_OFF_S[min(attempt, len(BACK_OFF_S)) - 1]
        is_too_late = monotonic() + wait_s > self._deadline
        if is_too_late or (attempt >= ATTEMPTS and trouble.wait_s is None):
            raise refusal(self._remote.name, trouble, what=file.name)
        if self._cancelled.wait(wait_s):
            raise failure("its fetch was given up", "NETWORK", permanent=False)

    def _check(self, file: RemoteFile) -> None:
        if self._cancelled.is_set():
            raise failure("its fetch was given up", "NETWORK", permanent=False)
        if monotonic() > self._deadline:
            raise failure(
                f"{self._remote.name} had not given all of {file.name} in time",
                "TIMEOUT",
                permanent=False,
                remedy="what came is kept: try again, or fetch it with `farmhand models prefetch`",
            )

    # -- digests -----------------------------------------------------------------------------------------------------

    def _verify(self, opened: list[_Open]) -> list[RemoteFile]:
        def check(one: _Open) -> RemoteFile:
            digest = verify(one.file, one.path)
            os.fsync(one.descriptor)
            return RemoteFile(name=one.file.name, size=one.file.size, sha256=digest)

        with ThreadPoolExecutor(self._connections, thread_name_prefix="weights") as pool:
            return list(pool.map(check, opened))

    # -- the partial folder ------------------------------------------------------------------------------------------

    def _path(self, file: RemoteFile) -> Path:
        return self._folder / FILES / file.name

    def _open(self, number: int, file: RemoteFile) -> _Open:
        path = self._path(file)
        one = _Open(file, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        starts = range(0, file.size, self._part_bytes)
        one.parts = [_Part(number, start, min(start + self._part_bytes, file.size)) for start in starts]
        return one

    def _read_journal(self) -> set[str]:
        """Parts that are whole; none, and an empty folder, if what lies here was of another plan."""
        plan = msgspec.json.encode({"part_bytes": self._part_bytes, "files": list(self._files)})
        place = self._folder / PLAN
        if place.exists() and place.read_bytes() == plan:
            with suppress(FileNotFoundError):
                lines = (self._folder / JOURNAL).read_text().split("\n")
                return set(lines[:-1])  # what follows the last line end was cut off
            return set()
        (self._folder / JOURNAL).unlink(missing_ok=True)
        for left in [path for path in (self._folder / FILES).rglob("*") if path.is_file()]:
            left.unlink()
        place.write_bytes(plan)
        return set()

    def _note(self, line: str) -> None:
        with self._lock, (self._folder / JOURNAL).open("a") as journal:
            journal.write(f"{line}\n")

    def _tell(self, came: int) -> None:
        with self._lock:
            self._here += came
            if self._on_progress is not None:
                self._on_progress(self._here, sum(file.size for file in self._files))


def refusal(remote: str, trouble: PassingError, *, what: str) -> ModelLoadError:
    """A remote that has been tried often enough, or asks for more patience than there is time."""
    if trouble.wait_s is not None:
        why = f"{remote} asks to wait {trouble.wait_s:g} s before {what} is asked for again"
        return failure(why, "NETWORK", permanent=False, retry_after_s=trouble.wait_s, remedy="try again then")
    return failure(
        f"{remote} does not give {what}: {said(trouble)}",
        "NETWORK",
        permanent=False,
        remedy="see whether this worker reaches it",
    )
