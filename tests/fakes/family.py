"""A family without torch: vectors and scores made of a text's SHA-256, cost as asked, and texts that do harm.

Options of the spec: ``dim``, ``batch_ms``, ``item_ms``, ``prepare_ms``, ``load_ms``, ``bytes`` (and ``estimate``, if
that is to differ), ``load_fails`` (``permanent``, ``passing``, ``segfault``, ``oom``).
Texts that act when they are computed: ``!raise !hang !segfault !exit !oom !lost !sleep:<seconds> !leak:<MiB>``; when
they are prepared: ``!refuse !prepare-hang !prepare-segfault``.
"""

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from common.errors import FarmError, ModelLoadError, RequestError
from config_db.spec import ModelSpec, Placement, Source
from tasks import codec
from tasks.messages import Request
from tasks.scores import ranking
from workers.host.families.protocol import Device
from workers.host.families.results import dense_items

PLACE = "tests.fakes.family:FakeFamily"
"""For ``FARMHAND_EXTRA_FAMILIES=fake=<this>``."""


def fake_vector(text: str, dim: int = 4) -> npt.NDArray[np.float32]:
    """The vector of a text: numbers in [-1, 1), the same in every process."""
    seed = hashlib.sha256(text.encode()).digest()
    blocks = (dim * 4 + 31) // 32
    digest = b"".join(hashlib.sha256(seed + block.to_bytes(4, "big")).digest() for block in range(blocks))
    whole = np.frombuffer(digest, dtype="<u4")[:dim]
    return (whole.astype(np.float64) / 2**31 - 1).astype(np.float32)


def fake_score(query: str, text: str) -> float:
    """The score of a pair: a number in [-1, 1), the same in every process."""
    return float(fake_vector(f"{query}\n{text}", 1)[0])


def fake_spec(name: str = "fake/one", *, path: Path | str, pinned: bool = False, **options: Any) -> ModelSpec:
    """A spec of the fake family; ``path`` is any directory under the worker's model roots."""
    return ModelSpec(
        id=name, family="fake", source=Source(path=str(path)), placement=Placement(pinned=pinned), options=options
    )


class AcceleratorError(RuntimeError):
    """Named as torch names the loss of a device."""


@dataclass(frozen=True)
class _Prepared:
    operation: str
    requests: Sequence[Request]
    request_tokens: Sequence[int]


class FakeModel:
    """One loaded fake model."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self.bytes = int(options.get("bytes", 1_000_000))
        self.is_closed = False

    def prepare(self, operation: str, requests: Sequence[Request]) -> _Prepared:
        assert operation in ("encode", "score", "extract")
        assert not self.is_closed
        self._sleep("prepare_ms")
        for text in _texts(requests):
            _act(_AT_PREPARE, text)
        return _Prepared(operation, requests, [sum(len(text.split()) for text in _texts([one])) for one in requests])

    def run(self, prepared: _Prepared) -> list[npt.NDArray[np.float32]]:
        assert not self.is_closed
        self._sleep("batch_ms")
        dim = int(self._options.get("dim", 4))
        rows = []
        for request in prepared.requests:
            for text in _texts([request]):
                self._sleep("item_ms")
                _act(_AT_RUN, text)
            rows.append(np.stack([fake_vector(text, dim) for text in _texts([request])]))
        return rows

    def finish(self, prepared: _Prepared, raw: list[npt.NDArray[np.float32]]) -> list[bytes | FarmError]:
        if prepared.operation == "score":
            return [_ranking(request) for request in prepared.requests]
        if prepared.operation == "extract":
            return [codec.pack([_extracted(item) for item in request.items]) for request in prepared.requests]
        pairs = zip(prepared.requests, raw, strict=True)
        return [dense_items(request.items, rows, request.output_dtype) for request, rows in pairs]

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True

    def _sleep(self, option: str) -> None:
        milliseconds = self._options.get(option, 0)
        if milliseconds:
            time.sleep(milliseconds / 1000)


class FakeFamily:
    """Loads fake models; counts how many."""

    def __init__(self) -> None:
        self.loads = 0

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        assert files.is_dir()
        return int(spec.options.get("estimate", spec.options.get("bytes", 1_000_000)))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> FakeModel:
        assert files.is_dir()
        assert device.pass_tokens > 0
        self.loads += 1
        time.sleep(spec.options.get("load_ms", 0) / 1000)
        _fail_to_load(spec)
        return FakeModel(spec.options)


def _fail_to_load(spec: ModelSpec) -> None:
    match spec.options.get("load_fails"):
        case None:
            return
        case "segfault":
            _segfault()
        case "oom":
            raise MemoryError
        case how:
            details = {"error_class": "CONFIG", "permanent": how == "permanent"}
            raise ModelLoadError(f"{spec.id} was told not to load", details=details)


def _ranking(request: Request) -> bytes:
    return ranking(request.items, [fake_score(request.query["text"], item["text"]) for item in request.items])


def _extracted(item: Any) -> dict[str, Any]:
    """Every word that begins with a capital is a name."""
    found = [
        {"text": word[0], "label": "name", "score": 0.5, "start": word.start(), "end": word.end()}
        for word in re.finditer(r"\b[A-Z]\w*", item["text"])
    ]
    nothing: dict[str, Any] = {"relations": [], "classifications": [], "objects": [], "data": None}
    return {"id": item["id"], "entities": found, **nothing}


def _texts(requests: Sequence[Request]) -> list[str]:
    return [item["text"] for request in requests for item in request.items]


def _act(actions: Mapping[str, Callable[[str], None]], text: str) -> None:
    action = actions.get(text.partition(":")[0])
    if action is not None:
        action(text)


def _raise(error: Exception) -> NoReturn:
    raise error


def _segfault(_: str = "") -> NoReturn:
    signal.raise_signal(signal.SIGSEGV)  # to this thread: it must not get any further
    raise AssertionError("SIGSEGV did not kill")


_AT_RUN: Mapping[str, Callable[[str], None]] = {
    "!raise": lambda _: _raise(ValueError("told to raise")),
    "!hang": lambda _: _hang(),
    "!segfault": _segfault,
    "!exit": lambda _: os._exit(1),
    "!oom": lambda _: _raise(MemoryError("told to run out of memory")),
    "!lost": lambda _: _raise(AcceleratorError("CUDA error: told to lose the device")),
    "!sleep": lambda text: time.sleep(float(text.partition(":")[2])),
    "!leak": lambda text: _leak(int(text.partition(":")[2])),
}
_AT_PREPARE: Mapping[str, Callable[[str], None]] = {
    "!refuse": lambda _: _raise(RequestError("told to refuse", param="items[0].text")),
    "!prepare-hang": lambda _: _hang(),
    "!prepare-segfault": _segfault,
}


_LEAKED: list[bytearray] = []


def _leak(mebibytes: int) -> None:
    _LEAKED.append(bytearray(b"x") * (mebibytes * 2**20))


def _hang() -> None:
    Event().wait()
