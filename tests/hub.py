"""A stand-in for the Hugging Face Hub: as much of its HTTP API as learning of a model and fetching it need.

Unknown routes fail. Weights are given as the Hub gives them: by a redirect to another host, which must not see the
token, with ranges, and under the headers that the Hub sends.
"""

import hashlib
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8}
ENCODER = {
    "config.json": BERT,
    "tokenizer_config.json": {"model_max_length": 512},
    "model.safetensors": None,
    "README.md": None,
}
"""The files of a plain encoder: JSON content by name, None for what nobody should ask for."""


@dataclass(frozen=True)
class Refusal:
    """What the Hub answers instead of a repository or file."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


GATED = Refusal(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/m is restricted."})
HIDDEN = Refusal(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})


@dataclass
class HubStandIn:
    """Repositories by name, each its files or a refusal. ``asked`` lists the paths that were asked for."""

    repositories: dict[str, Mapping[str, Any] | Refusal] = field(default_factory=dict)
    files_refused: dict[str, Refusal] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    """Of these repositories the Hub says nothing until ``released``."""
    released: Event = field(default_factory=Event)
    asked: list[str] = field(default_factory=list)
    url: str = ""
    token: str | None = None
    """Without it everything is gated."""
    fails: bool = False
    refusals: list[Refusal] = field(default_factory=list)
    """The next answers for the bytes of weights, before any other."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """After how many bytes the next answers for a file break off."""
    spoilt: dict[str, int] = field(default_factory=dict)
    """How many of the next answers for a file hold other bytes than they should."""
    stalls: dict[str, int] = field(default_factory=dict)
    """The byte of a file that no answer comes to until ``released``."""
    knows_ranges: bool = True
    fetched: list[tuple[str, int, int]] = field(default_factory=list)
    """What was asked for of the weights: file, first byte, and the one after the last."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes sent of each file of weights."""

    def look_ups(self, name: str) -> int:
        """How often a repository was looked up."""
        return self.asked.count(f"/api/models/{name}")

    def fetches(self, file: str) -> int:
        """How often weights, or a part of them, were asked for."""
        return sum(name == file for name, _, _ in self.fetched)


class _Answer(BaseHTTPRequestHandler):
    hub: HubStandIn

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        if self.hub.fails:
            self._refuse(Refusal(500))
        elif path.startswith("/cdn/"):
            self._weights(*path.removeprefix("/cdn/").split("|"))
        elif self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(GATED)
        elif path.startswith("/api/models/"):
            self._repository(path.removeprefix("/api/models/"))
        elif f"/resolve/{COMMIT}/" in path:
            name, _, file = path.removeprefix("/").partition(f"/resolve/{COMMIT}/")
            self._file(name, file)
        else:
            self._refuse(Refusal(500))

    def log_message(self, *_: object) -> None:
        pass

    def _repository(self, name: str) -> None:
        name, _, revision = name.partition("/revision/")
        if name in self.hub.silent:
            self.hub.released.wait(30)
        there = self.hub.repositories.get(self.hub.renamed.get(name, name), HIDDEN)
        if isinstance(there, Refusal):
            self._refuse(there)
            return
        if revision not in ("", "main", "v1", COMMIT):
            self._refuse(Refusal(404, {"X-Error-Code": "RevisionNotFound"}))
            return
        siblings = [_sibling(file, content, with_blobs="blobs=" in self.path) for file, content in there.items()]
        told = {"id": self.hub.renamed.get(name, name), "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(told).encode(), {})

    def _file(self, name: str, file: str) -> None:
        there = self.hub.repositories[name]
        if name in self.hub.files_refused:
            self._refuse(self.hub.files_refused[name])
            return
        assert not isinstance(there, Refusal)
        content = there[file]
        if content is None:
            self._refuse(Refusal(500))
            return
        raw = raw_of(content)
        if not _is_large(file):
            self._send(200, raw, {"X-Repo-Commit": COMMIT, "ETag": f'"{blob_id(raw)}"', "Accept-Ranges": "bytes"})
            return
        elsewhere = f"http://localhost:{self.server.server_address[1]}/cdn/{name}|{file}?X-Amz-Signature=secret"
        linked = {"X-Linked-Size": str(len(raw)), "X-Linked-ETag": f'"{hashlib.sha256(raw).hexdigest()}"'}
        self._send(302, b"", {"Location": elsewhere, "X-Repo-Commit": COMMIT, **linked})

    def _weights(self, name: str, file: str) -> None:
        """From the host that weights are kept at, which is no part of the Hub."""
        hub = self.hub
        if "Authorization" in self.headers:
            self._refuse(Refusal(400))
            return
        if hub.refusals:
            self._refuse(hub.refusals.pop(0))
            return
        there = hub.repositories[name]
        assert not isinstance(there, Refusal)
        raw = raw_of(there[file])
        start, stop = 0, len(raw)
        if hub.knows_ranges and (asked := self.headers.get("Range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1
        hub.fetched.append((file, start, stop))
        self._send_part(file, raw, start, stop)

    def _send_part(self, file: str, raw: bytes, start: int, stop: int) -> None:
        part = raw[start:stop]
        if self.hub.spoilt.get(file):
            self.hub.spoilt[file] -= 1
            part = bytes(byte ^ 1 for byte in part)
        cut = self.hub.cuts[file].pop(0) if self.hub.cuts.get(file) else None
        self.send_response(206 if self.hub.knows_ranges else 200)
        self.send_header("Content-Length", str(len(part)))
        if self.hub.knows_ranges:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(raw)}")
        self.end_headers()
        stall = self.hub.stalls.get(file)
        is_stalled = stall is not None and stall < stop
        ends = max(0, stall - start) if is_stalled else len(part) if cut is None else cut
        self.wfile.write(part[:ends])
        self.hub.sent[file] = self.hub.sent.get(file, 0) + len(part[:ends])
        if is_stalled:
            self.wfile.flush()
            self.hub.released.wait(60)
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, b'{"error": "refused"}', refusal.headers)

    def _send(self, status: int, raw: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


def _is_large(file: str) -> bool:
    """Whether it lies at the host of weights."""
    return file.endswith((".safetensors", ".bin", ".pt"))


def raw_of(content: Any) -> bytes:
    """The bytes of a file."""
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def blob_id(raw: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(f"blob {len(raw)}\0".encode() + raw, usedforsecurity=False).hexdigest()


def _sibling(file: str, content: Any, *, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": file}
    raw = raw_of(content)
    told = {"rfilename": file, "size": len(raw), "blobId": blob_id(raw)}
    if _is_large(file):
        told["lfs"] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 134}
    return told


@contextmanager
def serving_hub() -> Iterator[HubStandIn]:
    """A Hub on a port of its own, for the length of the block."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
