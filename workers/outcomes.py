"""Outcome and acknowledgement: one Lua call for many requests, repeated until answered.

Owns the outcomes that Redis has not confirmed. Each names the incarnation that held its message, so an outcome written
after the incarnation was given up can never answer a second time. Owned by the event loop thread.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final

import hiredis

from common.errors import CapacityError, FarmError
from common.faults import fault
from common.logs import get_logger
from tasks import messages, names
from tasks.messages import INLINE_OUTCOME_BYTES, Outcome
from tasks.objects import IN_REDIS_BYTES
from workers.aside import Aside
from workers.intake import Held
from workers.redis_link import RedisLink

log = get_logger("workers")

MESSAGES_PER_CALL: Final = 64
REPLY_TTL_S: Final = 60
STAGED_TTL_S: Final = 600
"""A large blob whose outcome call never comes is forgotten after this."""


@dataclass(slots=True)
class _Pending:
    """An outcome ready to be written: ``fields`` are its part of the call, ``blob`` goes under ``staged`` before it."""

    held: Held
    outcome: Outcome
    staged: str
    blob: bytes
    fields: tuple[bytes, ...]
    weight: int


class OutcomeWriter:
    """Buffers outcomes and writes them in bulk.

    Args:
        link: the incarnation's own connection.
        aside: where outcomes go that are too large for Redis.
        result_ttl_s: how long an asynchronous result is kept.
        tokens_per_minute: how many a tenant may spend; 0: any number.
        kombu_keys: unacknowledged hash and index of kombu's own transport on the fallback; None with ours.
        on_settled: called for each held request when Redis has confirmed, with whether this call answered it.
    """

    def __init__(
        self,
        link: RedisLink,
        aside: Aside,
        *,
        result_ttl_s: int,
        tokens_per_minute: Callable[[str], int],
        kombu_keys: tuple[str, str] | None,
        on_settled: Callable[[Held, Outcome, bool], None],
    ) -> None:
        self._link = link
        self._aside = aside
        self._result_ttl_s = result_ttl_s
        self._tokens_per_minute = tokens_per_minute
        self._kombu_keys = kombu_keys
        self._on_settled = on_settled
        self._waiting: list[_Pending] = []
        self._unconfirmed = 0
        self._set_aside = 0

    @property
    def unconfirmed(self) -> int:
        """Outcomes set aside, buffered or sent that Redis has not confirmed."""
        return len(self._waiting) + self._unconfirmed + self._set_aside

    def add(self, held: Held, outcome: Outcome, *, dead: str = "") -> None:
        """Buffer the one outcome of a request. ``dead`` is a dead letter to keep with it.

        Everything that could fail by what is in it is made here, so that it fails alone.
        """
        kind, where = _destination(held, outcome)
        if self._aside.is_there and kind != "none" and memoryview(outcome.result).nbytes > IN_REDIS_BYTES:
            self._put_aside(held, outcome, kind)
            return
        blob = self._blob(held, outcome, kind)
        # the incarnation is part of the name: another one that computes the same task stages a blob of its own
        staged = f"{names.result_key(held.id)}:{held.incarnation}" if len(blob) > INLINE_OUTCOME_BYTES else ""
        fallback = b""
        if staged and kind == "reply":
            fallback = messages.encode_outcome(
                Outcome(task_id=held.id, model=outcome.model, spec=outcome.spec, ref=staged)
            )
        elif staged:
            gone = messages.failed(
                held.id, CapacityError("the result was too large for Redis to keep"), model=outcome.model
            )
            fallback = self._blob(held, gone, kind)
        written = fallback if staged else blob
        fields = (
            *_fields(held, outcome, kind=kind, where=where, blob=written, staged=staged, dead=dead),
            *self._release(held),
        )
        self._waiting.append(_Pending(held, outcome, staged, blob, fields, len(written)))

    def _put_aside(self, held: Held, outcome: Outcome, kind: str) -> None:
        """Put an outcome into the object store first; then only its name is written, or why it could not be kept."""

        def told(answer: Any) -> None:
            self._set_aside -= 1
            if isinstance(answer, FarmError):
                self.add(held, messages.failed(held.id, answer, model=outcome.model, spec=outcome.spec))
            else:
                place = Outcome(task_id=held.id, model=outcome.model, spec=outcome.spec, object=answer)
                self.add(held, place)

        self._set_aside += 1
        kept_s = REPLY_TTL_S if kind == "reply" else held.ticket.keep_s or self._result_ttl_s
        self._aside.put(messages.encode_outcome(outcome), kept_s, told)

    def flush(self) -> None:
        """Send what is buffered, at most 64 messages or 4 MiB a call."""
        waiting, self._waiting = self._waiting, []
        for _, same in groupby(waiting, key=lambda one: (one.held.incarnation, one.held.ticket.keep_s)):
            for chunk in _chunks(list(same)):
                self._send(chunk)

    def _send(self, chunk: list[_Pending]) -> None:
        for pending in chunk:
            if pending.staged:
                self._link.call("SET", pending.staged, pending.blob, "EX", STAGED_TTL_S, repeat=True)
        incarnation = chunk[0].held.incarnation
        unacked, index = self._kombu_keys or (names.unacked(incarnation), "")
        day = datetime.now(UTC).date().isoformat()
        keys = [
            unacked,
            names.started(incarnation),
            names.OPEN,
            names.LOST,
            names.DEAD_LETTERS,
            names.usage_key(day),
            index,
        ]
        arguments: list[Any] = [chunk[0].held.ticket.keep_s or self._result_ttl_s, REPLY_TTL_S]
        for pending in chunk:
            arguments += pending.fields
        self._unconfirmed += len(chunk)
        fault("worker.before_outcome")
        self._link.script("outcome", keys, arguments, then=lambda reply: self._on_reply(chunk, reply), repeat=True)

    def _on_reply(self, chunk: list[_Pending], reply: Any) -> None:
        self._unconfirmed -= len(chunk)
        if isinstance(reply, hiredis.ReplyError):
            log.error("outcome_refused", error=str(reply), requests=len(chunk))
            self._waiting = chunk + self._waiting  # the next tick's flush tries again
            return
        fault("worker.after_outcome")
        for pending, answer in zip(chunk, reply, strict=True):
            if pending.held.ticket.body_object is not None:
                self._aside.delete(pending.held.ticket.body_object)
            self._on_settled(pending.held, pending.outcome, answer == 1)

    def _release(self, held: Held) -> tuple[bytes, ...]:
        """The fields that give back what admission has counted: the slots, and tokens estimated and not used."""
        ticket = held.ticket
        slots = names.slots(ticket.model, ticket.tenant, held.queue)
        per_minute = self._tokens_per_minute(ticket.tenant)
        clock, wrong_s = "", 0.0
        if per_minute:
            clock, wrong_s = names.token_clock(ticket.tenant), (held.tokens_used - ticket.tokens) * 60 / per_minute
        return tuple(text.encode() for text in (*slots, clock, f"{wrong_s:.6f}"))

    def _blob(self, held: Held, outcome: Outcome, kind: str) -> bytes:
        if kind == "reply":
            return messages.encode_outcome(outcome)
        if kind == "result":
            return messages.encode_celery_meta(outcome, held.request.operation, done_at=datetime.now(UTC).isoformat())
        return b""


def _destination(held: Held, outcome: Outcome) -> tuple[str, str]:
    """How the caller hears of it: a reply on its list, Celery's result backend, or not at all."""
    reply_to = held.request.reply_to
    if held.ticket.asynchronous or not held.ticket.admitted:
        return ("none", "") if held.request.ignore_result else ("result", names.celery_meta(outcome.task_id))
    return ("reply", reply_to) if reply_to else ("none", "")


def _fields(
    held: Held, outcome: Outcome, *, kind: str, where: str, blob: bytes, staged: str, dead: str
) -> tuple[bytes, ...]:
    """One message's first fields, in the order ``outcome.lua`` documents; ``_release`` has the rest."""
    ticket = held.ticket
    texts = (
        staged,
        names.task_record(held.id) if ticket.asynchronous and ticket.admitted else "",
        outcome.state,
        ticket.body_key or "",
        held.lost_digest,
        dead,
        f"{ticket.tenant}|{ticket.model}" if outcome.error is None else "",
        str(held.tokens_used),
    )
    head = (str(held.tag), held.id, str(int(ticket.admitted)), kind, where)
    return (*(text.encode() for text in head), blob, *(text.encode() for text in texts))


def _chunks(pending: Sequence[_Pending]) -> Iterator[list[_Pending]]:
    """Split into calls of at most 64 messages or 4 MiB."""
    chunk: list[_Pending] = []
    size = 0
    for one in pending:
        if chunk and (len(chunk) >= MESSAGES_PER_CALL or size + one.weight > INLINE_OUTCOME_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(one)
        size += one.weight
    if chunk:
        yield chunk


def dead_letter(held: Held, reason: str) -> str:
    """A dead letter as the CLI shows and replays it."""
    popped = getattr(held.request.message, "popped", None)
    return json.dumps(
        {
            "task_id": held.id,
            "queue": held.queue,
            "reason": reason,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "raw": popped.raw.decode("utf-8", "surrogateescape") if popped else "",
        }
    )
