"""Callers that go away: what nobody has started to compute for them is cancelled.

Owns who is watched. One thread (or greenlet) per process looks at all of them, and cancels in one packet; it starts
with the first caller, after any fork. A caller that has gone is found in one of these states:

  not yet published   looked at again, until Redis has confirmed or the publish has failed
  queued, or held     its task is closed as by any cancelling (``settle.lua``): the slot is free at once, the message is
                      dropped uncomputed by the worker that finds it, and the waiter is told
  started             left alone: the work is being done, the outcome is booked, and read by nobody or by a caller that
                      has only closed its sending side
  answered            left alone

On the plain Redis transport starts are not noted, and what has started counts as held.

What dies and what happens here:
  the web process     nobody is left to look: the requests of its callers are computed and dropped
  Redis               who has gone stays watched, and the next look cancels
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import sleep
from typing import Any, Final

from common.errors import CancelledError, QueueUnavailableError
from common.logs import get_logger
from tasks import names, scripts
from tasks.publisher import OPEN_GRACE_S, Entry
from tasks.replies import Waiter

log = get_logger("tasks")

LOOK_EVERY_S: Final = 0.25
CANCELLED_AT_ONCE: Final = 100
"""In one packet, so that the slowest takes a fraction of what a connection waits for its answer."""


@dataclass(slots=True, eq=False)
class _Watched:
    entry: Entry
    waiter: Waiter
    has_left: Callable[[], bool]


class Callers:
    """Those of one process that wait and can be seen to leave; thread-safe.

    Args:
        ask_many: sends commands in one packet and returns their answers; QueueUnavailableError if there are none.
    """

    def __init__(self, ask_many: Callable[..., Sequence[Any]]) -> None:
        self._ask_many = ask_many
        self._watched: dict[str, _Watched] = {}
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def watch(self, entry: Entry, waiter: Waiter, has_left: Callable[[], bool]) -> None:
        """Cancel this request if its caller leaves. ``has_left`` is asked often, in our thread, and must not block."""
        self._watched[entry.task_id] = _Watched(entry, waiter, has_left)
        if self._thread is None:
            self._start()

    def forget(self, task_id: str) -> None:
        """The caller has what it waited for."""
        self._watched.pop(task_id, None)

    def close(self) -> None:
        """End the thread with its next look."""
        self._is_closed = True

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="farm-callers", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._is_closed:
            sleep(LOOK_EVERY_S)
            try:
                self._look()
            except QueueUnavailableError as error:
                log.info("callers_not_cancelled", error=error.message)
            except Exception:
                log.exception("callers_broken", watched=len(self._watched))

    def _look(self) -> None:
        """Cancel what those have asked for who have gone since the last look."""
        gone = [one for one in list(self._watched.values()) if one.entry.is_published and one.has_left()]
        for at in range(0, len(gone), CANCELLED_AT_ONCE):
            self._cancel(gone[at : at + CANCELLED_AT_ONCE])

    def _cancel(self, gone: Sequence[_Watched]) -> None:
        answers = self._ask_many(*(_settle_unless_started(one.entry) for one in gone))
        for one, answer in zip(gone, answers, strict=True):
            self.forget(one.entry.task_id)
            if answer == 1:
                one.waiter.fail(CancelledError("the caller closed the connection before its request was started"))


def _settle_unless_started(entry: Entry) -> tuple[Any, ...]:
    """A call of ``settle.lua`` for a synchronous request. Its id is kept until its message would be too late anyway."""
    keys = [*names.settled_keys(entry.task_id), *names.slots(entry.model, entry.tenant, entry.queue)]
    unstarted = entry.deadline + OPEN_GRACE_S
    kept_s = int(entry.timeout_s) + OPEN_GRACE_S
    return ("EVAL", scripts.source("settle"), len(keys), *keys, entry.task_id, "cancelled", b"", 0, kept_s, unstarted)
