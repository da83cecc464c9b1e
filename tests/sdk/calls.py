"""Calls of the public SIE SDK against a farm, run by the Python that the SDK is installed in; prints what came as JSON.

``calls.py sync|async <base url> <key>``. The SDK is not changed; its clients are used as its documents say.
"""

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import sie_sdk
from sie_sdk import Item, SIEAsyncClient, SIEClient
from sie_sdk.client import async_, sync

for module in (sync, async_):
    module.DEFAULT_LEASE_RENEWAL_INTERVAL_S = 0.5  # a minute otherwise: its own thread, or task, renews all the same


def plain(value: Any) -> Any:
    """What JSON can carry."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return plain(vars(value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def first_of(stream: Any) -> Any:
    """The first of what a watcher is told, which then watches no longer."""
    if hasattr(stream, "__aiter__"):
        return _first_of_async(stream)
    with contextlib.closing(stream):
        return next(stream)


async def _first_of_async(stream: Any) -> Any:
    async with contextlib.aclosing(stream):
        return await anext(stream)


ITEM = Item(text="one")
CHAT = [{"role": "user", "content": "x"}]
FROM_ZERO: dict[str, Callable[[Any], Any]] = {
    "encode without a worker": lambda client: client.encode("org/m", ITEM, wait_for_capacity=False),
    "capacity of nothing": lambda client: client.get_capacity(),
    "wait in vain": lambda client: client.wait_for_capacity("l4", timeout_s=0.1, poll_interval_s=0.05),
    "encode from zero": lambda client: client.encode("org/m", ITEM),
}
"""What is called while there is no worker; one is started when the last of these has been asked."""
CALLS: dict[str, Callable[[Any], Any]] = {
    **FROM_ZERO,
    "encode one": lambda client: client.encode("org/m", Item(text="one", id="a")),
    "encode many": lambda client: client.encode("org/m", [Item(text="one"), Item(text="two")]),
    "encode as a query": lambda client: client.encode("org/m", Item(text="one"), is_query=True),
    "encode in int8": lambda client: client.encode("org/m", Item(text="one"), output_dtype="int8"),
    "score": lambda client: client.score("org/rank", Item(text="q"), [Item(text="one", id="x"), Item(text="two")]),
    "models": lambda client: client.list_models(),
    "model": lambda client: client.get_model("org/m"),
    "unknown model": lambda client: client.encode("org/none", Item(text="one")),
    "wrong output": lambda client: client.encode("org/m", Item(text="one"), output_types=["sparse"]),
    "encode while it loads": lambda client: client.encode("org/slow", ITEM),
    "capacity": lambda client: client.get_capacity(),
    "capacity of cpu": lambda client: client.get_capacity(gpu="CPU"),
    "capacity of l4": lambda client: client.get_capacity(gpu="l4"),
    "wait for capacity": lambda client: client.wait_for_capacity("cpu", timeout_s=30),
    "wait for a model": lambda client: client.wait_for_capacity("cpu", model="org/m", timeout_s=30),
    "watch": lambda client: first_of(client.watch()),
    "watch the cluster": lambda client: first_of(client.watch(mode="cluster")),
    "watch one worker": lambda client: first_of(client.watch(mode="worker")),
    "generate": lambda client: client.generate("org/m", "x", max_new_tokens=1),
    "chat": lambda client: client.chat_completions("org/m", CHAT),
    "respond": lambda client: client.responses("org/m", "x"),
    "stream generate": lambda client: first_of(client.stream_generate("org/m", "x", max_new_tokens=1)),
    "stream chat": lambda client: first_of(client.stream_chat_completions("org/m", CHAT)),
    "estimate": lambda client: client.estimate("/v1/encode/org/m", {"items": [{"text": "x"}]}),
    "recommend": lambda client: client.recommend("retrieval"),
    "make a job": lambda client: client.jobs.submit(source=[{"text": "x"}], model="org/m"),
    "jobs": lambda client: client.jobs.list(),
    "job": lambda client: client.jobs.get("job-1"),
    "files": lambda client: client.files.list(),
    "file": lambda client: client.files.content("file-1"),
    "batches": lambda client: client.batches.list(),
    "make a batch": lambda client: client.batches.create(input_file_id="file-1"),
    "model that there is not": lambda client: client.get_model("org/none"),
    "create a pool": lambda client: client.create_pool("eval", {"cpu": 1}, bundle="default", minimum_worker_count=1),
    "encode in the pool": lambda client: client.encode(
        "org/m", Item(text="one"), gpu="eval/cpu", wait_for_capacity=True, provision_timeout_s=60
    ),
    "pool": lambda client: client.get_pool("eval"),
    "create it again": lambda client: client.create_pool("eval", {"cpu": 2}),
    "pool that has grown": lambda client: client.get_pool("eval"),
    "delete the pool": lambda client: client.delete_pool("eval"),
    "delete it again": lambda client: client.delete_pool("eval"),
    "pool that there is not": lambda client: client.get_pool("eval"),
    "create a pool of nothing": lambda client: client.create_pool("p", {"tpu": 1}),
}


class Heard(logging.Handler):
    """What the SDK says of its pools."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "lease" in record.getMessage():
            self.lines.append(record.getMessage())


def told(name: str, result: Any) -> tuple[str, Any]:
    return name, {"result": plain(result)}


def failed(name: str, error: Exception) -> tuple[str, Any]:
    said = {"kind": type(error).__name__, "code": getattr(error, "code", None), "text": str(error)}
    return name, {"error": {**said, "status": getattr(error, "status_code", None)}}


def run_sync(url: str, key: str) -> dict[str, Any]:
    found = []
    with SIEClient(url, api_key=key) as client:
        for name, call in CALLS.items():
            try:
                found.append(told(name, call(client)))
            except Exception as error:  # noqa: BLE001 - which one it is, is what is asked
                found.append(failed(name, error))
    return dict(found)


async def run_async(url: str, key: str) -> dict[str, Any]:
    found = []
    async with SIEAsyncClient(url, api_key=key) as client:
        for name, call in CALLS.items():
            try:
                found.append(told(name, await call(client)))
            except Exception as error:  # noqa: BLE001 - which one it is, is what is asked
                found.append(failed(name, error))
    return dict(found)


if __name__ == "__main__":
    mode, url, key = sys.argv[1:4]
    heard = Heard()
    logging.getLogger("sie_sdk").setLevel(logging.DEBUG)
    logging.getLogger("sie_sdk").addHandler(heard)
    answers = run_sync(url, key) if mode == "sync" else asyncio.run(run_async(url, key))
    answers["lease"] = {"result": heard.lines}
    json.dump({"version": sie_sdk.__version__, "answers": answers}, sys.stdout)
