"""Messages the farm has given up, kept in Redis: looking at them, and giving one another life."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import redis

from common.errors import SetupError
from tasks import names

TIMEOUT_S: Final = 5.0
REOPENED_S: Final = 3600
"""How long a replayed task may wait for its new outcome before it counts as overdue."""


@dataclass(frozen=True)
class DeadLetter:
    """One of them. ``entry`` is what stands in Redis; the rest is empty where that does not say."""

    entry: bytes
    task_id: str
    queue: str
    reason: str
    at: str
    raw: bytes


class DeadLetterBox:
    """The list in Redis; a context manager."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.Redis.from_url(redis_url, socket_connect_timeout=TIMEOUT_S, socket_timeout=TIMEOUT_S)

    def __enter__(self) -> "DeadLetterBox":
        try:
            self._redis.ping()
        except redis.RedisError as error:
            raise SetupError(f"Redis does not answer: {error}; is FARMHAND_REDIS_URL right?") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._redis.close()

    def letters(self) -> Iterator[DeadLetter]:
        """All of them, newest first."""
        entries: list[bytes] = self._redis.lrange(names.DEAD_LETTERS, 0, -1)  # type: ignore[assignment]
        return map(_read, entries)

    def replay(self, letter: DeadLetter) -> bool:
        """Put the message back into its queue, as if it had never been lost; false if somebody else just has.

        Its task is open again, so that the new outcome replaces the one it was given up with.

        Raises:
            SetupError: the letter does not say which queue or which message.
        """
        if not letter.queue or not letter.raw:
            raise SetupError(f"the dead letter of task {letter.task_id or '?'} holds no message that could be replayed")
        removed: Any = self._redis.transaction(lambda pipe: self._move(pipe, letter), names.DEAD_LETTERS)
        return bool(removed[0])

    def _move(self, pipe: Any, letter: DeadLetter) -> None:
        bell = names.bell(letter.queue)
        is_there = pipe.lpos(names.DEAD_LETTERS, letter.entry) is not None
        is_rung = bool(pipe.exists(bell))
        now = int(pipe.time()[0])
        pipe.multi()
        pipe.lrem(names.DEAD_LETTERS, 1, letter.entry)
        if not is_there:
            return
        if letter.task_id:
            pipe.zadd(names.OPEN, {letter.task_id: now + REOPENED_S})
        pipe.hdel(names.LOST, hashlib.sha1(letter.raw, usedforsecurity=False).hexdigest())
        pipe.lpush(letter.queue, letter.raw)
        if not is_rung:
            pipe.rpush(bell, "1")


def _read(entry: bytes) -> DeadLetter:
    text = entry.decode("utf-8", "surrogateescape")
    try:
        told = json.loads(text)
    except ValueError:
        told = {"reason": "unreadable entry"}
    field = {name: str(told.get(name, "")) for name in ("task_id", "queue", "reason", "at")}
    raw = str(told.get("raw", "")).encode("utf-8", "surrogateescape")
    return DeadLetter(entry=entry, **field, raw=raw)
