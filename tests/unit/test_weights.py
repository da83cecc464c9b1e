"""Where model files come from: local roots, the Hub cache, a Hub that is there, refuses, hangs or is away.

The Hub is a stand-in that speaks as much of its API as huggingface_hub asks of it; huggingface_hub itself is real.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any, TypeAlias

import pytest

from common.errors import ModelLoadError
from config_db.spec import Source
from workers.weights.resolve import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "farm/tiny"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "1_Pooling/config.json": b'{"pooling_mode": "mean"}',
    "model.safetensors": b"s" * 200_000,
    "pytorch_model.bin": b"pickled code",
    "modeling_tiny.py": b"raise SystemExit",
}
Process: TypeAlias = "subprocess.Popen[str]"
RESOLVE = """
import json, sys
from pathlib import Path
from common.errors import ModelLoadError
from config_db.spec import Source
from workers.weights.resolve import resolve
source, cache = Source(**json.loads(sys.argv[1])), Path(sys.argv[2])
try:
    found = resolve(source, allowed_roots=(), cache_dir=cache, hub_timeout_s=float(sys.argv[3]))
    print(json.dumps({"path": str(found)}))
except ModelLoadError as error:
    print(json.dumps({"error": error.as_dict()}))
"""


@dataclass
class Hub:
    """A Hub of one repository; ``served`` lists the requests, ``break_off`` cuts the weights' first bytes short."""

    url: str = ""
    served: list[str] = field(default_factory=list)
    gated: bool = False
    fails: bool = False
    break_off: bool = False
    hangs: Event = field(default_factory=Event)
    released: Event = field(default_factory=Event)

    def fetched(self, name: str) -> int:
        """How often a file's content was asked for."""
        return sum(line.startswith("GET") and line.endswith(f"/resolve/{COMMIT}/{name}") for line in self.served)


class _Answer(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_GET  # noqa: N815 - the name http.server asks for

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.served.append(f"{self.command} {path}")
        if hub.hangs.is_set():
            hub.released.wait(30)
            return
        if hub.fails:
            self._send(500, b"{}")
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._revision(path.rpartition("/")[2])
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in FILES.items()
            ]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            self._file(path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/"))
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _revision(self, name: str) -> None:
        if name not in ("main", "v1", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in FILES]
        self._send(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())

    def _file(self, name: str) -> None:
        if self.hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        data = FILES[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"'}
        if self.hub.break_off and name.endswith("safetensors") and self.command == "GET":
            self._send(200, data[:1000], {**headers, "Content-Length": str(len(data))})
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._send(200, data, headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def begin(
    url: str, cache: Path, *, timeout_s: float = 10, offline: bool = False, **source: str
) -> "subprocess.Popen[str]":
    """Resolve in a process of its own: huggingface_hub reads its environment once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environ = {**kept, "HF_ENDPOINT": url, "HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environ |= {"NO_PROXY": "*", "no_proxy": "*", **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    command = [sys.executable, "-c", RESOLVE, json.dumps(source), str(cache / "hub"), str(timeout_s)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: Process) -> dict[str, Any]:
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 0, complaint[-2000:]
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def fetch(url: str, cache: Path, **rest: Any) -> dict[str, Any]:
    return end(begin(url, cache, **{"hub": REPOSITORY, **rest}))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# -- local directories -----------------------------------------------------------------------------------------------


def local(path: Path, *roots: Path) -> Path:
    return resolve(Source(path=str(path)), allowed_roots=roots, cache_dir=None)


def test_a_directory_under_an_allowed_root_is_taken(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    assert local(tmp_path / "models" / "a", tmp_path / "other", tmp_path / "models") == tmp_path / "models" / "a"


@pytest.mark.parametrize("path", ["models-of-others/a", "models/../secret", "models/link", "models/linked/a"])
def test_a_directory_elsewhere_is_refused_however_it_is_written(tmp_path: Path, path: str) -> None:
    for name in ("models", "models-of-others/a", "secret/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelLoadError, match="none of the allowed") as caught:
        local(tmp_path / path, tmp_path / "models")
    assert caught.value.details == {"error_class": "CONFIG", "permanent": True}


def test_a_root_that_is_itself_a_link_allows_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    assert local(tmp_path / "models" / "a", tmp_path / "models") == tmp_path / "disk" / "a"


def test_a_directory_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no directory") as caught:
        local(tmp_path / "gone", tmp_path)
    assert caught.value.details["error_class"] == "NOT_FOUND"


def test_a_source_of_nothing_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="neither a path nor"):
        resolve(Source(), allowed_roots=(), cache_dir=None)


# -- the Hub and its cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_what_the_hub_gave_is_whole_and_never_asked_for_again(hub: Hub, tmp_path: Path, revision: str | None) -> None:
    source = {"revision": revision} if revision else {}
    found = Path(fetch(hub.url, tmp_path, **source)["path"])
    fetched = {str(path.relative_to(found)): path.read_bytes() for path in found.rglob("*") if path.is_file()}
    assert fetched == {name: data for name, data in FILES.items() if name.endswith((".json", ".safetensors"))}
    asked = len(hub.served)
    assert fetch(hub.url, tmp_path, **source) == {"path": str(found)}
    assert len(hub.served) == asked


def test_processes_that_want_the_same_model_download_it_once(hub: Hub, tmp_path: Path) -> None:
    both = [begin(hub.url, tmp_path, hub=REPOSITORY, revision=COMMIT) for _ in range(2)]
    paths = {end(one)["path"] for one in both}
    assert len(paths) == 1
    assert hub.fetched("model.safetensors") == 1


def test_a_download_that_broke_off_is_never_used(hub: Hub, tmp_path: Path) -> None:
    hub.break_off = True
    assert fetch(hub.url, tmp_path)["error"]["error_class"] == "NETWORK"
    assert fetch(hub.url, tmp_path, offline=True)["error"]["error_class"] == "NETWORK"
    hub.break_off = False
    found = Path(fetch(hub.url, tmp_path)["path"])
    assert (found / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_an_unknown_repository_or_revision_is_not_found_for_good(hub: Hub, tmp_path: Path) -> None:
    for wanted in ({"hub": "farm/none"}, {"revision": "v9"}):
        error = fetch(hub.url, tmp_path, **wanted)["error"]
        assert (error["error_class"], error["permanent"]) == ("NOT_FOUND", True)
        assert "Hub cache" in error["message"]
        assert hub.url in error["message"]


def test_a_gated_repository_asks_for_a_token(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    error = fetch(hub.url, tmp_path)["error"]
    assert (error["error_class"], error["permanent"]) == ("GATED", True)
    assert "token" in error["message"]


@pytest.mark.parametrize("revision", ["main", COMMIT])
@pytest.mark.parametrize("away", ["refuses", "hangs", "fails"])
def test_a_hub_that_is_away_is_given_up_soon(hub: Hub, tmp_path: Path, away: str, revision: str) -> None:
    url = hub.url if away != "refuses" else f"http://127.0.0.1:{free_port()}"
    hub.fails = away == "fails"
    if away == "hangs":
        hub.hangs.set()
    process = begin(url, tmp_path, timeout_s=0.5, hub=REPOSITORY, revision=revision)
    started = monotonic()
    error = end(process)["error"]
    assert monotonic() - started < 10  # its own start is most of it; the retries of huggingface_hub would take 23 s
    assert (error["error_class"], error["permanent"]) == ("NETWORK", False)
    assert url in error["message"]
