"""What is secret stands in no log, no answer and no key of Redis, whatever is asked and whatever goes wrong."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from config_db.spec import ModelSpec, Source
from tests.live import FAKE, LiveFarm, fake_spec
from tests.services import ROOT, free_port
from tests.web import gunicorn, start_web_of, stop_web

TOKEN, ADMIN, WRONG = "tok-0123456789abcdef", "adm-0123456789abcdef", "wro-0123456789abcdef"
ENVIRONMENT = {
    "HF_TOKEN": "hf_0123456789abcdefsecret",
    "HF_ENDPOINT": "http://127.0.0.1:1",
    "AWS_ACCESS_KEY_ID": "AKIA0123456789ABCDEF",
    "AWS_SECRET_ACCESS_KEY": "aws/0123456789/secret",
}
SECRETS = [TOKEN, ADMIN, WRONG, ENVIRONMENT["HF_TOKEN"], ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]]
BODY = {"items": [{"text": "a"}]}


@pytest.fixture
def live(redis_url: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveFarm]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    farm = LiveFarm(redis_url, database_url, tmp_path)
    gone = ModelSpec(id="org/gone", family="dense", source=Source(hub="org/gone", revision="0" * 40))
    farm.add_models(fake_spec(), gone)
    farm.start_worker(log_level="DEBUG")
    yield farm
    farm.close()


def test_secrets_stand_nowhere(live: LiveFarm) -> None:
    passwords = [word for url in (live.redis_url, live.database_url) if (word := urlsplit(url).password)]
    assert passwords
    settings = {"AUTH": "static", "AUTH_TOKENS": TOKEN, "AUTH_ADMIN_TOKENS": ADMIN, "LOG_LEVEL": "DEBUG"}
    web = start_web_of(live, **settings)
    said = []
    for token in (TOKEN, ADMIN, WRONG):
        bearer = {"Authorization": f"Bearer {token}"}
        said += [
            web.http.post(f"/v1/encode/{FAKE}", json=BODY, headers={**bearer, "Idempotency-Key": token[:3]}),
            web.http.post(f"/v1/encode/{FAKE}", json={"items": [{"text": "!raise"}]}, headers=bearer),
            web.http.post(f"/v1/encode/{FAKE}?mode=async", json=BODY, headers={"Authorization": token}),
            web.http.post("/v1/encode/org/gone", json=BODY, headers={**bearer, "X-Farmhand-Timeout": "5"}),
            web.http.post(f"/v1/encode/{FAKE}", content=b"no", headers=bearer),
            web.http.get("/v1/configs/export", headers=bearer),
            web.http.get("/v1/tasks/none", headers={"Authorization": f"bearer {token}"}),
        ]
    assert {200, 202, 400, 401, 403, 500} <= {answer.status_code for answer in said}
    assert web.http.get("/healthz", headers={"Authorization": TOKEN}).status_code == 200
    stop_web(web)
    refused = cannot_start(live)
    logs = "".join(path.read_text(errors="replace") for path in live.directory.rglob("*.log"))
    assert '"event"' in logs or "event=" in logs or "worker" in logs
    echoed = "".join(f"{answer.headers}{answer.text}" for answer in said)
    kept = "".join(map(live_content(live), live.redis.scan_iter("*")))
    for text in (logs, refused, echoed, kept):
        assert not [secret for secret in (*SECRETS, *passwords) if secret in text]


def live_content(live: LiveFarm) -> Callable[[bytes], str]:
    """Reads a key of any kind as text."""
    read = {
        b"string": live.redis.get,
        b"hash": live.redis.hgetall,
        b"list": lambda key: live.redis.lrange(key, 0, -1),
        b"set": live.redis.smembers,
        b"zset": lambda key: live.redis.zrange(key, 0, -1),
    }
    return lambda key: repr((key, read[live.redis.type(key)](key)))


def cannot_start(live: LiveFarm) -> str:
    """What a web process says that reaches no server, or finds a setting wrong."""
    said = ""
    for settings in (
        {"DATABASE_URL": "postgresql://farm:0123456789secret@127.0.0.1:1/farm"},
        {"AUTH": "static", "AUTH_TOKENS": "short-secret", "DATABASE_URL": live.database_url},
        {"AUTH_TOKEN": TOKEN},
        {"QUEUE_LIMIT": "none", "AUTH_TOKENS": TOKEN},
    ):
        command, environment = gunicorn(live.redis_url, live.directory / "none", free_port(), (), **settings)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode != 0, settings
        said += done.stdout + done.stderr
        assert "0123456789secret" not in said
        assert "short-secret" not in said
    return said
