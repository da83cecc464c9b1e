"""Replies to synchronous requests: one list per process, one listener, and who waits for what.

How nothing is lost: the listener reads replies where they stand and removes them with its *next* packet, when it has
them. A connection that breaks in between leaves them on the list, and the next one reads them again; a reply read twice
finds no waiter the second time and is dropped. While it has nothing to do the listener sleeps on the list with a BLMOVE
from its head to its head, which waits for a reply and changes nothing.
"""

import threading
from contextlib import suppress
from time import sleep
from typing import Any, Final

import redis

from common.errors import FarmError, MessageError
from common.faults import fault
from common.logs import get_logger
from tasks import messages, names
from tasks.messages import Outcome
from tasks.redis_line import RedisLine, is_out_of_memory, pack

log = get_logger("tasks")

REPLIES_PER_READ: Final = 16
BLOCK_S: Final = 5
ANSWER_TIMEOUT_S: Final = 8.0
"""Longer than the longest sleep in Redis: silence beyond it means a half-open connection."""
RECONNECT_S: Final = 0.25
FULL_POLL_S: Final = 0.01
"""At ``maxmemory`` Redis refuses BLMOVE, so the list is polled until there is room again."""


class Waiter:
    """One caller's place to wait for its outcome, or for the word that there will be none."""

    __slots__ = ("_event", "error", "is_given_up", "outcome")

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.error: FarmError | None = None
        self.is_given_up = False
        self._event = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        """Wait until something has come; false if the time ran out before."""
        return self._event.wait(max(0.0, timeout_s))

    def put(self, outcome: Outcome) -> None:
        """Hand over the outcome."""
        self.outcome = outcome
        self._event.set()

    def fail(self, error: FarmError) -> None:
        """Hand over why there will be no outcome."""
        self.error = error
        self._event.set()

    def give_up(self, error: FarmError) -> None:
        """Send the caller away though a reply may still come: its request is to be taken back."""
        self.is_given_up = True
        self.fail(error)

    def confirm(self) -> None:
        """Say that the request is published, to a caller that waits for no more than that."""
        self._event.set()


class ReplyListener:
    """Hands the replies of one process to its waiters; thread-safe. The thread starts with the first waiter.

    Args:
        url: Redis URL.
        process: names this process; must be new after a fork.
    """

    def __init__(self, url: str, *, process: str) -> None:
        self.list = names.reply_list(process)
        self.dropped = 0
        self._line = RedisLine(url, name="farmhand-replies", answer_timeout_s=ANSWER_TIMEOUT_S)
        self._waiters: dict[str, Waiter] = {}
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._read_all = pack("LRANGE", self.list, 0, REPLIES_PER_READ - 1)
        self._sleep_and_read = pack("BLMOVE", self.list, self.list, "LEFT", "LEFT", BLOCK_S) + pack(
            "LRANGE", self.list, 1, REPLIES_PER_READ - 1
        )

    def register(self, task_id: str) -> Waiter:
        """Expect a reply: before the request is published."""
        waiter = self._waiters[task_id] = Waiter()
        if self._thread is None:
            self._start()
        return waiter

    def forget(self, task_id: str) -> None:
        """Expect it no longer; a later reply is dropped and counted."""
        self._waiters.pop(task_id, None)

    @property
    def waiting(self) -> int:
        """Callers that wait for a reply now."""
        return len(self._waiters)

    def give_up(self, error: FarmError) -> None:
        """Send everyone away who waits: this process ends."""
        while self._waiters:
            with suppress(KeyError):  # its reply has just come
                self._waiters.popitem()[1].give_up(error)

    def close(self) -> None:
        """End the listener; what still comes is left to the list's time to live."""
        self._is_closed = True
        self._line.close()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="farm-replies", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        is_away = False
        while not self._is_closed:
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                if not is_away and not self._is_closed:
                    log.warning("replies_lost_connection", error=str(error), waiting=self.waiting)
                is_away = True
                sleep(RECONNECT_S)
                continue
            except Exception:
                log.exception("replies_broken", waiting=self.waiting)
                self._line.close()
                sleep(RECONNECT_S)
            is_away = False

    def _listen(self) -> None:
        """Read until the connection breaks; it starts with what an earlier one may have left."""
        taken, sleeps = 0, False
        while not self._is_closed:
            replies, sleeps = self._read(taken, sleeps=sleeps)
            if replies:
                fault("web.reply_read")
            for raw in replies:
                self._hand_over(raw)
            taken = len(replies)

    def _read(self, taken: int, *, sleeps: bool) -> tuple[list[bytes], bool]:
        """Remove the ``taken`` replies read before and read the next; also returns whether to sleep the next time."""
        packet = pack("LTRIM", self.list, taken, -1) if taken else b""
        answers = self._line.exchange(
            packet + (self._sleep_and_read if sleeps else self._read_all), bool(taken) + 1 + sleeps
        )
        _refuse_errors(answers, allow_full=sleeps)
        if not sleeps:
            replies: list[bytes] = answers[-1]
            return replies, len(replies) < REPLIES_PER_READ
        head, others = answers[-2:]
        if isinstance(head, redis.ResponseError):
            sleep(FULL_POLL_S)
            return [], False
        return ([] if head is None else [head, *others]), len(others) < REPLIES_PER_READ - 1

    def _hand_over(self, raw: bytes) -> None:
        try:
            outcome = messages.decode_outcome(raw)
        except MessageError as error:
            log.warning("reply_damaged", error=error.message)
            return
        waiter = self._waiters.pop(outcome.task_id, None)
        if waiter is None:
            self.dropped += 1
        else:
            waiter.put(outcome)


def _refuse_errors(answers: list[Any], *, allow_full: bool) -> None:
    for answer in answers:
        if isinstance(answer, redis.ResponseError) and not (allow_full and is_out_of_memory(answer)):
            raise answer
