"""Another load generator: several streams of requests at once, each its own kind, open or closed; a process of its own.

``python -m bench.streams PORT SECONDS STREAMS``, the last as JSON (``Stream``), prints one JSON object by stream. An
open stream sends at its rate whatever is answered, over as many connections as it takes; a closed one has so many
callers who ask, wait, and ask again. Requests are built beforehand, answers not decoded.
"""

import asyncio
import random
import resource
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import msgspec

from bench import texts

BODIES = 128
REQUEST_LINES = {"native": "/v1/encode/{model}", "openai": "/v1/embeddings"}


class Stream(msgspec.Struct, kw_only=True, frozen=True):
    """What one kind of caller does: ``rate`` requests a second, or so many ``callers``."""

    name: str
    model: str
    route: Literal["native", "openai"] = "native"
    texts: int = 1
    callers: int = 0
    rate: float = 0.0
    deadline_ms: float = 0.0
    headers: dict[str, str] = {}


@dataclass
class Seen:
    """What the callers of a stream saw; ``in_time`` counts answers before the deadline."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    in_time: int = 0
    late_start_ms: float = 0.0


def requests(stream: Stream) -> list[bytes]:
    """Whole HTTP requests of a stream."""
    dice = random.Random(11)
    sample = texts.short(max(BODIES, stream.texts), seed=5)
    headers = dict(stream.headers)
    if stream.deadline_ms:
        headers["X-Deadline-Ms"] = str(stream.deadline_ms)
    made = []
    for _ in range(BODIES):
        chosen = dice.sample(sample, stream.texts)
        if stream.route == "openai":
            body = msgspec.json.encode({"model": stream.model, "input": chosen, "encoding_format": "base64"})
            kind = "application/json"
        else:
            body, kind = msgspec.msgpack.encode({"items": [{"text": one} for one in chosen]}), "application/msgpack"
        lines = [
            f"POST {REQUEST_LINES[stream.route].format(model=stream.model)} HTTP/1.1",
            "Host: bench",
            f"Content-Type: {kind}",
            f"Accept: {kind}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        made.append("\r\n".join([*lines, "", ""]).encode() + body)
    return made


class Connections:
    """Idle connections of one stream; a further one is made when none is idle."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()

    async def ask(self, request: bytes) -> int:
        """The status of the answer to one request."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(_header(head, b"content-length") or 0))
        if _header(head, b"connection") == b"close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head[9:12])

    def close(self) -> None:
        """Drop them."""
        for _, writer in self._idle:
            writer.close()


def _header(head: bytes, name: bytes) -> bytes:
    _, found, rest = head.partition(b"\r\n" + name + b": ")
    return rest.split(b"\r\n", 1)[0] if found else b""


class Caller:
    """Asks for one stream and notes what comes."""

    def __init__(self, stream: Stream, port: int) -> None:
        self.stream, self.seen = stream, Seen()
        self._made, self._place = requests(stream), 0
        self._connections = Connections(port)

    async def run(self, until: float) -> None:
        """All of the stream, until the end."""
        if self.stream.rate:
            await self._open(until)
        else:
            await asyncio.gather(*(self._closed(until) for _ in range(self.stream.callers)))
        self._connections.close()

    async def _closed(self, until: float) -> None:
        while perf_counter() < until:
            await self._ask()

    async def _open(self, until: float) -> None:
        due, asked = perf_counter(), set()
        while due < until:
            await asyncio.sleep(max(0.0, due - perf_counter()))
            self.seen.late_start_ms = max(self.seen.late_start_ms, (perf_counter() - due) * 1000)
            one = asyncio.ensure_future(self._ask())
            asked.add(one)
            one.add_done_callback(asked.discard)
            due += 1 / self.stream.rate
        await asyncio.gather(*asked)

    async def _ask(self) -> None:
        self._place = (self._place + 1) % len(self._made)
        began = perf_counter()
        status = await self._connections.ask(self._made[self._place])
        taken_ms = (perf_counter() - began) * 1000
        self.seen.statuses[status] += 1
        if status == 200:
            self.seen.latencies_ms.append(taken_ms)
            self.seen.in_time += not self.stream.deadline_ms or taken_ms <= self.stream.deadline_ms


async def run(port: int, seconds: float, streams: list[Stream]) -> dict[str, Any]:
    """All streams side by side."""
    callers = [Caller(stream, port) for stream in streams]
    began, used = perf_counter(), _cpu_s()
    await asyncio.gather(*(caller.run(began + seconds) for caller in callers))
    took = perf_counter() - began
    cpu_s = _cpu_s() - used
    return {
        "cpu_s": cpu_s,
        "cpu_share": cpu_s / took,
        "streams": {caller.stream.name: _told(caller.seen, seconds) for caller in callers},
    }


def _told(seen: Seen, seconds: float) -> dict[str, Any]:
    ordered = sorted(seen.latencies_ms) or [0.0]
    return {
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "served": len(seen.latencies_ms),
        "in_time": seen.in_time,
        "in_time_s": seen.in_time / seconds,
        "p50_ms": ordered[len(ordered) // 2],
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "late_start_ms": seen.late_start_ms,
    }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print."""
    streams = msgspec.json.decode(sys.argv[3], type=list[Stream])
    found = asyncio.run(run(int(sys.argv[1]), float(sys.argv[2]), streams))
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
