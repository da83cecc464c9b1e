"""Starting children that cannot outlive this process, and knowing a process again by more than its number.

Each child leads a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone, which ends its
children in order. The kernel kills a child when the *thread* that started it ends: only the main thread starts any.
"""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc: Final = ctypes.CDLL(None, use_errno=True)


def spawn(
    command: Sequence[str], *, environment: Mapping[str, str], log: Path, output: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a child; its errors, and its output unless ``output`` names a file, are appended to ``log``."""
    with log.open("ab") as errors, output.open("wb") if output else log.open("ab") as answers:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=answers,
            stderr=errors,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=_dying_with(os.getpid()),  # this process has one thread
        )


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent died, so that none is lost sight of."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury_orphans(known: set[int]) -> None:
    """Collect ended children other than ``known``, whose owner asks for them himself."""
    with suppress(ChildProcessError):  # there are none at all
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in known:
                return
            os.waitpid(ended.si_pid, 0)


def kill_group(pid: int) -> None:
    """End a child and all that share its session."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def kill_descendants(wait_s: float) -> None:
    """End everything that descends from this process."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=wait_s)


def born_at(pid: int) -> float | None:
    """When the process of this id was started, which tells it from a later one of the same id; None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def left_of(leaders: Mapping[int, float]) -> list[int]:
    """Who is left of former sessions; ``leaders`` maps their ids to when they were born.

    While a session has members its id is given to no new process: a leader of another birth means that it is over.
    """
    births = {pid: born_at(pid) for pid in leaders}
    alive = [pid for pid, born in births.items() if born is not None and born == leaders[pid]]
    headless = {pid for pid, born in births.items() if born is None}
    return alive + ([pid for pid in psutil.pids() if _session(pid) in headless] if headless else [])


def kill(pids: Iterable[int]) -> None:
    """End processes, whether or not they are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _dying_with(parent: int) -> Callable[[], None]:
    def die_with_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return die_with_parent
