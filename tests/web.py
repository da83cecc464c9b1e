"""A real gunicorn with the real web tier, for tests that speak HTTP to it."""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.live import LiveFarm
from tests.services import free_port, spawn, wait_until


@dataclass
class Web:
    """One running gunicorn and a client of it."""

    http: httpx.Client
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def encode(self, *texts: str, **rest: Any) -> httpx.Response:
        return self.http.post("/v1/encode/org/m", json={"items": [{"text": text} for text in texts]}, **rest)


def gunicorn(
    redis_url: str, directory: Path, port: int, application: tuple[str, ...], **settings: str
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a web tier; ``application`` is empty for the real one."""
    environment = os.environ | {"FARMHAND_REDIS_URL": redis_url, "FARMHAND_STATE_DIR": str(directory)}
    environment |= {f"FARMHAND_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "gunicorn", "-c", "python:webapp.gunicorn_conf"]
    return [*command, "-b", f"127.0.0.1:{port}", *application], environment


def start_web(
    redis_url: str, directory: Path, application: tuple[str, ...] = ("tests.standin:build_web()",), **settings: str
) -> Web:
    port = free_port()
    command, environment = gunicorn(redis_url, directory, port, application, **settings)
    log = directory / "web.log"
    process = spawn(command, log, environment)
    web = Web(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30), port, process, log)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(httpx.TransportError):
            return web.http.get("/healthz").status_code == 200
        return False

    wait_until(answers, 20, "gunicorn to answer")
    return web


def start_web_of(farm: LiveFarm, **settings: str) -> Web:
    """The real API over a farm's Redis and config DB."""
    return start_web(farm.redis_url, farm.directory, (), DATABASE_URL=farm.database_url, **settings)


def stop_web(web: Web) -> None:
    web.http.close()
    web.process.terminate()
    web.process.wait(15)
    assert "Traceback" not in web.log.read_text()
