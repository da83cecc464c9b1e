"""Returns to the queues what no living worker holds: messages of dead incarnations, and pops whose reply was lost.

Closes, too, the tasks whose message is lost for good: somebody has emptied a queue by hand.

A dead incarnation is one found silent in two looks 2 s apart; test and move are one Lua call of at most 100 messages or
4 MiB, so that no worker, however slow, can lose a message it still answers for. Owned by the event loop thread.
"""

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Final

from common.logs import get_logger
from tasks import names, settling
from tasks.transport import BELL_PREFIX
from workers.redis_link import RedisLink

log = get_logger("workers")

LOOKS_APART_S: Final = 2.0
MESSAGES_PER_MOVE: Final = 100
BYTES_PER_MOVE: Final = 4 * 2**20


class Janitor:
    """Looks after the incarnations known to Redis."""

    def __init__(self, link: RedisLink, *, result_ttl_s: int) -> None:
        self._link = link
        self._result_ttl_s = result_ttl_s
        self._silent_since: dict[str, float] = {}

    def look(self) -> None:
        """Look which incarnations are silent; called every second."""
        self._link.call("HKEYS", names.INCARNATIONS, then=self._on_known)

    def _on_known(self, reply: Any) -> None:
        if not isinstance(reply, list):
            return
        known = [name.decode() for name in reply]
        self._silent_since = {one: since for one, since in self._silent_since.items() if one in known}
        for incarnation in known:
            self._link.call("EXISTS", names.beat(incarnation), then=partial(self._on_look, incarnation))

    def _on_look(self, incarnation: str, alive: Any) -> None:
        now = monotonic()
        if alive != 0:
            self._silent_since.pop(incarnation, None)
            return
        since = self._silent_since.setdefault(incarnation, now)
        if now - since >= LOOKS_APART_S:
            self._move(incarnation)

    def close_overdue(self) -> None:
        """Answer the tasks whose message is nowhere any more; called now and then."""
        settling.close_overdue(
            lambda name, keys, arguments: self._link.script(name, keys, arguments), result_ttl_s=self._result_ttl_s
        )

    def bury(self, incarnation: str) -> None:
        """Return the messages of an incarnation known to be over: this process's own former one."""
        self._move(incarnation)

    def _move(self, incarnation: str) -> None:
        keys = [
            names.beat(incarnation),
            names.unacked(incarnation),
            names.started(incarnation),
            names.LOST,
            names.DEAD_LETTERS,
            names.INCARNATIONS,
        ]
        arguments = [incarnation, MESSAGES_PER_MOVE, BYTES_PER_MOVE, BELL_PREFIX]
        self._link.script("restore", keys, arguments, then=lambda reply: self._on_moved(incarnation, reply))

    def _on_moved(self, incarnation: str, reply: Any) -> None:
        if not isinstance(reply, list) or reply[0] < 0:
            self._silent_since.pop(incarnation, None)
            return
        moved, left = reply
        log.warning("incarnation_buried", incarnation=incarnation, moved=moved, left=left)
        if left:
            self._move(incarnation)
        else:
            self._silent_since.pop(incarnation, None)


def return_unheld(
    link: RedisLink,
    incarnation: str,
    *,
    settled_below: Callable[[], int],
    missing: Callable[[list[int]], list[int]],
) -> None:
    """Compare this incarnation's records with its intake and return those it does not hold: a pop's reply was lost.

    Args:
        link: the incarnation's own connection.
        incarnation: whose records are compared.
        settled_below: tags at or above this may belong to a pop that is still under way.
        missing: those of the given tags that the intake does not hold.
    """
    bound = settled_below()

    def compare(reply: Any) -> None:
        if not isinstance(reply, list):
            return
        lost = missing([tag for tag in map(int, reply) if tag < bound])
        if lost:
            log.warning("records_unheld", incarnation=incarnation, messages=len(lost))
            give_back(link, incarnation, lost)

    link.call("HKEYS", names.unacked(incarnation), then=compare)


def give_back(link: RedisLink, incarnation: str, tags: list[int], *, where: str = "queue") -> None:
    """Return messages of this incarnation to their queues, the oldest where it is popped next."""
    newest_first = sorted(tags, reverse=True)
    keys = [names.unacked(incarnation), names.started(incarnation), names.DEAD_LETTERS]
    for at in range(0, len(newest_first), MESSAGES_PER_MOVE):
        chunk = newest_first[at : at + MESSAGES_PER_MOVE]
        link.script("give_back", keys, [BELL_PREFIX, where, *chunk], repeat=True)
