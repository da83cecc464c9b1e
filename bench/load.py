"""The load generator: a process of its own, asyncio streams, requests built beforehand, answers not decoded.

``python -m bench.load PORT CALLERS TEXTS SECONDS KIND MODEL[,MODEL...]`` prints one JSON object. ``KIND`` is short or
mixed. With several models each request asks one of them, by Zipf's law; ``MODEL#ADAPTER`` asks for an adapter, of
several each as often as any other.
"""

import asyncio
import json
import random
import resource
import sys
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import msgspec

from bench import texts

BODIES = 256
BODIES_A_MODEL = 8
WARM_UP_S = 0.5


@dataclass
class Seen:
    """What all callers saw. ``answered`` and ``failed`` count the warm-up, too: it uses CPU as well."""

    latencies_ms: list[float] = field(default_factory=list)
    above_model_ms: list[float] = field(default_factory=list)
    answered: int = 0
    failed: int = 0


def requests(count: int, kind: str, models: list[str]) -> list[bytes]:
    """Whole HTTP requests, bodies in msgpack."""
    dice = random.Random(7)
    weights = [1 / (rank + 1) if "#" not in name else 1 for rank, name in enumerate(models)]
    sample = getattr(texts, kind)(max(BODIES, count), seed=3)
    made = []
    for _ in range(max(BODIES, BODIES_A_MODEL * len(models))):
        items = [{"text": text} for text in dice.sample(sample, count)]
        model, _, adapter = dice.choices(models, weights)[0].partition("#")
        rest = {"params": {"options": {"lora": adapter}}} if adapter else {}
        body = msgspec.msgpack.encode({"items": items, **rest})
        head = (
            f"POST /v1/encode/{model} HTTP/1.1\r\nHost: bench\r\n"
            f"Content-Type: application/msgpack\r\nAccept: application/msgpack\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


async def caller(port: int, made: list[bytes], place: int, until: float, seen: Seen, *, reads_timing: bool) -> None:
    """Ask, wait, ask again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count_from = perf_counter() + WARM_UP_S
    while (asked := perf_counter()) < until:
        writer.write(made[place % len(made)])
        place += 1
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length:")[1].split(b"\r\n", 1)[0])
        body = await reader.readexactly(size)
        seen.answered += 1
        if not head.startswith(b"HTTP/1.1 200"):
            seen.failed += 1
            continue
        if asked < count_from:
            continue
        taken_ms = (perf_counter() - asked) * 1000
        seen.latencies_ms.append(taken_ms)
        if reads_timing:
            timing = msgspec.msgpack.decode(body)["timing"]
            seen.above_model_ms.append(
                taken_ms
                - sum(timing.get(f"{step}_ms") or 0 for step in ("tokenization", "inference", "postprocessing"))
            )
    writer.close()


async def run(port: int, callers: int, made: list[bytes], seconds: float) -> Seen:
    """All callers at once."""
    seen = Seen()
    until = perf_counter() + seconds + WARM_UP_S
    asking = [
        caller(port, made, n * len(made) // callers, until, seen, reads_timing=callers == 1) for n in range(callers)
    ]
    await asyncio.gather(*asking)
    return seen


def main() -> None:
    """Measure and print."""
    port, callers, count = (int(word) for word in sys.argv[1:4])
    seconds, kind, models = float(sys.argv[4]), sys.argv[5], sys.argv[6].split(",")
    made = requests(count, kind, models)
    before = resource.getrusage(resource.RUSAGE_SELF)
    seen = asyncio.run(run(port, callers, made, seconds))
    after = resource.getrusage(resource.RUSAGE_SELF)
    ordered = sorted(seen.latencies_ms) or [0.0]
    print(
        json.dumps(
            {
                "requests_s": len(seen.latencies_ms) / seconds,
                "texts_s": len(seen.latencies_ms) * count / seconds,
                "p50_ms": ordered[len(ordered) // 2],
                "p99_ms": ordered[int(len(ordered) * 0.99)],
                "above_model_ms": median(seen.above_model_ms) if seen.above_model_ms else None,
                "failed": seen.failed,
                "requests": len(seen.latencies_ms),
                "answered": seen.answered,
                "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            }
        )
    )


if __name__ == "__main__":
    main()
