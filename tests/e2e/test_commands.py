"""The small commands, each against real servers."""

import hashlib
import json
from pathlib import Path

import pytest

from tasks import names
from tests.e2e.farms import farmhand
from tests.services import PostgresServer, RedisServer

QUEUE = "farm.default.cpu.standard"
CATALOGUE = """
models:
- {id: first/model, family: dense, source: {hub: first/model}, dims: {dense: 8}}
- {id: second, family: dense, source: {path: /models/second}, dims: {dense: 8}}
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    (tmp_path / "models.yaml").write_text(CATALOGUE)
    return tmp_path


def test_an_empty_database_is_migrated_and_filled(postgres_server: PostgresServer, catalogue: Path) -> None:
    url = {"FARMHAND_DATABASE_URL": postgres_server.empty_database()}
    assert farmhand("migrate", **url).returncode == 0
    assert farmhand("models", **url).stdout == ""
    assert farmhand("config", "apply", str(catalogue), **url).stdout.endswith(
        "epoch 2: 2 added, 0 changed, 0 removed\n"
    )
    assert farmhand("config", "apply", str(catalogue), **url).stdout == "epoch 2: 0 added, 0 changed, 0 removed\n"
    assert farmhand("models", **url).stdout.splitlines() == [
        "first/model\tdense\tencode\thub:first/model@main",
        "second\tdense\tencode\t/models/second",
    ]


def test_pruning_stops_serving_what_the_files_do_not_name(database_url: str, catalogue: Path) -> None:
    url = {"FARMHAND_DATABASE_URL": database_url}
    farmhand("config", "apply", str(catalogue), **url)
    (catalogue / "models.yaml").write_text("\n".join(CATALOGUE.splitlines()[:3]))
    farmhand("config", "apply", str(catalogue), "--prune", **url)
    assert [line.split("\t")[0] for line in farmhand("models", **url).stdout.splitlines()] == ["first/model"]


def test_a_broken_catalogue_is_one_line(database_url: str, catalogue: Path) -> None:
    (catalogue / "models.yaml").write_text("id: [\n")
    refused = farmhand("config", "apply", str(catalogue), FARMHAND_DATABASE_URL=database_url)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "models.yaml" in refused.stderr


@pytest.mark.parametrize("words", [("models",), ("migrate",), ("dead-letters", "list")])
def test_a_server_that_does_not_answer_is_one_line(words: tuple[str, ...]) -> None:
    away = {"FARMHAND_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x", "FARMHAND_REDIS_URL": "redis://127.0.0.1:1/0"}
    refused = farmhand(*words, **away)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "does not answer" in refused.stderr


def test_dead_letters_are_listed_and_replayed(redis_url: str, redis_server: RedisServer) -> None:
    raw = '{"body": "\udcff"}'  # a byte that is no UTF-8, as a hostile message may hold
    letter = {"task_id": "t-1", "queue": QUEUE, "reason": "WORKER_LOST", "at": "2026-01-01T00:00:00+00:00", "raw": raw}
    sent = raw.encode("utf-8", "surrogateescape")
    lost = hashlib.sha1(sent, usedforsecurity=False).hexdigest()
    with redis_server.client() as client:
        client.lpush(
            names.DEAD_LETTERS, json.dumps(letter), b'{"queue": "", "raw": "?", "reason": "unreadable record"}'
        )
        client.hset(names.LOST, lost, 3)
        url = {"FARMHAND_REDIS_URL": redis_url}
        assert farmhand("dead-letters", "list", **url).stdout.splitlines() == [
            "1\t-\tunreadable record\t-\t-",
            f"2\t2026-01-01T00:00:00+00:00\tWORKER_LOST\t{QUEUE}\tt-1",
        ]
        assert farmhand("dead-letters", "replay", "t-1", **url).stdout == "1 replayed\n"
        assert client.lrange(QUEUE, 0, -1) == [sent]
        assert client.lrange(names.bell(QUEUE), 0, -1) == [b"1"]
        assert client.zscore(names.OPEN, "t-1") is not None
        assert client.hget(names.LOST, lost) is None
        assert client.llen(names.DEAD_LETTERS) == 1


def test_replaying_what_is_not_there_is_one_line(redis_url: str) -> None:
    for words in (("t-2",), ()):
        refused = farmhand("dead-letters", "replay", *words, FARMHAND_REDIS_URL=redis_url)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
