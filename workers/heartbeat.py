"""The life of one process incarnation: a uuid, its heartbeat key, and what it tells others about itself.

States: unborn -> alive (the key is set) -> closing (pops return nothing) -> dead (the key is gone). A worker that was
frozen past the key's life, or whose Redis was away that long, finds itself dead and is born again under a new uuid;
what it held goes back to the queues by the janitor. Owned by the event loop thread.
"""

import json
import os
import socket
from collections.abc import Callable
from typing import Any, Final
from uuid import uuid4

import hiredis

from common.logs import get_logger
from tasks import names
from workers.redis_link import LinkLostError, RedisLink

log = get_logger("workers")

BEAT_LIFE_S: Final = 5
CLOSING_LIFE_S: Final = 60
BIRTH: Final = "redis.call('DEL', KEYS[1]) return redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])"
"""A script that begins by removing is accepted by a full Redis; a plain SET is not."""


class Heartbeat:
    """Keeps this incarnation's key alive and its description current.

    Args:
        link: the incarnation's own connection.
        describe: what other processes may know of this worker, JSON-able.
        on_reborn: called with the former uuid after a new one was taken: drop the intake.
    """

    def __init__(
        self, link: RedisLink, *, describe: Callable[[], dict[str, Any]], on_reborn: Callable[[str], None]
    ) -> None:
        self.incarnation = uuid4().hex
        self.is_alive = False
        self._link = link
        self._describe = describe
        self._on_reborn = on_reborn
        self._told = ""
        self._closing = False

    def be_born(self) -> None:
        """Set the heartbeat key. Its life is renewed with EXPIRE, which a full Redis still accepts."""
        incarnation = self.incarnation

        def born(reply: Any) -> None:
            if incarnation == self.incarnation and not isinstance(reply, (hiredis.ReplyError, LinkLostError)):
                self.is_alive = True
                log.info("incarnation_born", incarnation=incarnation)

        self._link.call("EVAL", BIRTH, 1, names.beat(incarnation), BEAT_LIFE_S, then=born)
        self._told = ""
        self.tell()

    def beat(self) -> None:
        """Renew the key; called every second."""
        incarnation = self.incarnation
        if not self.is_alive:
            self.be_born()
            return

        def beaten(reply: Any) -> None:
            if reply == 0 and incarnation == self.incarnation:
                self.be_reborn()

        self._link.call("EXPIRE", names.beat(incarnation), BEAT_LIFE_S, then=beaten)
        self.tell()

    def tell(self) -> None:
        """Publish the description if it changed."""
        text = json.dumps({**self._describe(), "pid": os.getpid(), "hostname": socket.gethostname()}, sort_keys=True)
        if text == self._told:
            return

        def told(reply: Any) -> None:
            if isinstance(reply, (hiredis.ReplyError, LinkLostError)):
                self._told = ""

        self._told = text
        self._link.call("HSET", names.INCARNATIONS, self.incarnation, text, then=told)

    def be_reborn(self) -> None:
        """The key is gone: this incarnation's messages are or will be others'. Start over under a new uuid."""
        if self._closing:
            return
        log.warning("incarnation_lost", incarnation=self.incarnation)
        self.is_alive = False
        former, self.incarnation = self.incarnation, uuid4().hex
        self._on_reborn(former)
        self.be_born()

    def close(self) -> None:
        """From now on pops of this incarnation return nothing."""
        self._closing = True
        self._link.call("SET", names.closing(self.incarnation), "1", "EX", CLOSING_LIFE_S, repeat=True)

    def die(self) -> None:
        """This process answers no more; what records are left, the janitor returns."""
        self.is_alive = False
        self._link.call(
            "DEL", names.beat(self.incarnation), names.started(self.incarnation), names.closing(self.incarnation)
        )
