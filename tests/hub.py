"""A stand-in for the Hugging Face Hub: as much of its HTTP API as learning of a model needs; unknown routes fail."""

import json
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

    def look_ups(self, name: str) -> int:
        """How often a repository was looked up."""
        return self.asked.count(f"/api/models/{name}")


class _Answer(BaseHTTPRequestHandler):
    hub: HubStandIn

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        if path.startswith("/api/models/"):
            self._repository(path.removeprefix("/api/models/"))
        elif f"/resolve/{COMMIT}/" in path:
            name, _, file = path.removeprefix("/").partition(f"/resolve/{COMMIT}/")
            self._file(name, file)
        else:
            self._refuse(Refusal(500))

    def log_message(self, *_: object) -> None:
        pass

    def _repository(self, name: str) -> None:
        if name in self.hub.silent:
            self.hub.released.wait(30)
        there = self.hub.repositories.get(self.hub.renamed.get(name, name), HIDDEN)
        if isinstance(there, Refusal):
            self._refuse(there)
            return
        siblings = [{"rfilename": file} for file in there]
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
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._send(200, raw, {"X-Repo-Commit": COMMIT})

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, b'{"error": "refused"}', refusal.headers)

    def _send(self, status: int, raw: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def serving_hub() -> Iterator[HubStandIn]:
    """A Hub on a port of its own, for the length of the block."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
