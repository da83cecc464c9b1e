"""A stand-in worker: takes messages with plain Redis commands and answers through the real outcome script.

It stands in where the client or the web tier is tested and no model is needed. The "vector" of a text is its length and
the sum of its bytes.
"""

import base64
import json
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import orjson
import redis
from flask import Flask

from common.errors import FarmError
from common.settings import WebSettings, load_settings
from config_db.snapshot import Snapshot
from config_db.spec import Limits, ModelSpec, Source
from tasks import codec, messages, names, scripts
from tasks.client import FarmClient
from tasks.messages import Outcome, Request, Ticket
from tasks.names import Lane, queue_name
from webapp.app import create_app

QUEUE = queue_name("default", "cpu", Lane.INTERACTIVE)
ASYNC_QUEUE = queue_name("default", "cpu", Lane.STANDARD)


def vector_of(text: str) -> list[float]:
    """What the stand-in answers for a text."""
    raw = text.encode()
    return [float(len(raw)), float(sum(raw) % 65536)]


@dataclass(frozen=True)
class Taken:
    """One message off the queue."""

    task_id: str
    ticket: Ticket
    request: Request
    reply_to: str | None
    raw: bytes
    queue: str


class StandIn:
    """Serves from a thread between ``start`` and ``stop``; ``take`` and ``answer`` do the same by hand."""

    def __init__(self, redis_url: str) -> None:
        self.redis: redis.Redis = redis.Redis.from_url(redis_url, socket_timeout=5)
        self.incarnation = uuid4().hex
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> "StandIn":
        """Answer everything as it comes."""
        self.tell()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop answering."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(10)
            assert not self._thread.is_alive()

    def tell(self, **described: Any) -> "StandIn":
        """Say that a worker lives, as a real one's heartbeat does."""
        told = {"node": "stand-in", "queues": [QUEUE, ASYNC_QUEUE], "ready": True, "resident": [], "transport": "farm"}
        self.redis.hset(names.INCARNATIONS, self.incarnation, json.dumps({**told, **described}))
        self.redis.set(names.beat(self.incarnation), "1", ex=60)
        return self

    def fall_silent(self) -> None:
        """The heartbeat ends, as a dead worker's does."""
        self.redis.delete(names.beat(self.incarnation))

    def take(self, wait_s: float = 5) -> Taken:
        """Take the next message."""
        got: Any = self.redis.brpop([QUEUE, ASYNC_QUEUE], timeout=wait_s)
        assert got is not None, "no message came"
        return self._parse(got[1])

    def _parse(self, raw: bytes) -> Taken:
        envelope = orjson.loads(raw)
        ticket = messages.read_ticket(envelope["headers"])
        assert ticket is not None
        body: Any = base64.b64decode(envelope["body"])
        if ticket.body_key is not None:
            body = self.redis.get(ticket.body_key)
        _, request = messages.decode_body(body)
        properties = envelope["properties"]
        queue = properties["delivery_info"]["routing_key"]
        taken = Taken(envelope["headers"]["id"], ticket, request, properties["reply_to"], raw, queue)
        self.hold(taken)
        return taken

    def hold(self, taken: Taken) -> None:
        """Record the message as unacknowledged, as a pop does."""
        self.redis.hset(names.unacked(self.incarnation), taken.task_id, taken.raw)

    def begin(self, taken: Taken) -> None:
        """Say through the real script that the message has been started."""
        keys = [names.unacked(self.incarnation), names.started(self.incarnation), names.OPEN]
        record = names.task_record(taken.task_id) if taken.ticket.asynchronous else ""
        self.redis.eval(scripts.source("start"), len(keys), *keys, taken.task_id, taken.task_id, record)

    def answer(self, *taken: Taken, error: FarmError | None = None, by_reference: bool = False) -> list[int]:
        """Give each its outcome through the real script; returns its answers: 1 answered, 0 somebody else had."""
        unacked, arguments = names.unacked(self.incarnation), [taken[0].ticket.keep_s or 3600, 60]
        for one in taken:
            arguments += self._fields(one, error, by_reference=by_reference)
        keys = [
            unacked,
            names.started(self.incarnation),
            names.OPEN,
            names.LOST,
            names.DEAD_LETTERS,
            names.usage_key("2026-01-01"),
            "",
        ]
        answers: Any = self.redis.eval(scripts.source("outcome"), len(keys), *keys, *arguments)
        return list(answers)

    def _fields(self, one: Taken, error: FarmError | None, *, by_reference: bool) -> list[Any]:
        ticket, outcome = one.ticket, self._outcome(one, error)
        if ticket.asynchronous:
            done_at = datetime.now(UTC).isoformat()
            kind, where = "result", names.celery_meta(one.task_id)
            blob = messages.encode_celery_meta(outcome, ticket.operation, done_at=done_at)
        else:
            kind, where, blob = "reply", one.reply_to or "", messages.encode_outcome(outcome)
        staged = names.result_key(one.task_id) if by_reference else ""
        if by_reference:
            self.redis.set(staged, blob, ex=60)
            blob = messages.encode_outcome(
                Outcome(task_id=one.task_id, model=ticket.model, spec=ticket.spec, ref=staged)
            )
        record = names.task_record(one.task_id) if ticket.asynchronous else ""
        return [
            one.task_id,
            one.task_id,
            1,
            kind,
            where,
            blob,
            staged,
            record,
            outcome.state,
            ticket.body_key or "",
            "",
            "",
            "",
            1,
            *names.slots(ticket.model, ticket.tenant, one.queue),
            "",
            0,
        ]

    def _outcome(self, one: Taken, error: FarmError | None) -> Outcome:
        if error is not None:
            return messages.failed(one.task_id, error, model=one.ticket.model, spec=one.ticket.spec)
        items = [
            {
                **({"id": item["id"]} if "id" in item else {}),
                "dense": {"dims": 2, "dtype": "float32", "values": np.array(vector_of(item["text"]), np.float32)},
            }
            for item in one.request.items
        ]
        return Outcome(
            task_id=one.task_id,
            model=one.ticket.model,
            spec=one.ticket.spec,
            result=msgspec.Raw(codec.pack(items)),
            timing={"queue_ms": 1.5, "tokenization_ms": 0.25, "inference_ms": 2.0, "postprocessing_ms": 0.125},
            usage={"input_tokens": one.ticket.tokens},
        )

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                got: Any = self.redis.brpop([QUEUE, ASYNC_QUEUE], timeout=0.1)
                if got is not None:
                    others: Any = self.redis.rpop(got[0].decode(), 63) or []
                    self.answer(*(self._parse(raw) for raw in (got[1], *others)))
            except redis.ConnectionError:
                self._stopping.wait(0.05)


class StaticSnapshots:
    """What ``config_db.reader.SnapshotReader`` is to the web tier, over models given in the test."""

    is_connected = True

    def __init__(self, *specs: ModelSpec) -> None:
        self.current = Snapshot(3, uuid4(), {spec.id: spec for spec in specs})

    def poll_soon(self) -> None:
        """Nothing newer ever comes."""


SPECS = (
    ModelSpec(id="org/m", family="fake", source=Source(path="/"), dims={"dense": 2}, limits=Limits(max_items=64)),
    ModelSpec(id="org/rank", family="fake", source=Source(path="/"), operations=("score",), outputs=("score",)),
)


def build_web() -> Flask:
    """The web tier over static models, as gunicorn loads it in tests."""
    settings = load_settings(WebSettings)
    client = FarmClient(settings.redis_url, queue_limit=settings.queue_limit, result_ttl_s=settings.result_ttl_s)
    return create_app(settings, StaticSnapshots(*SPECS), client)
