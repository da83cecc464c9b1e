"""Writes that race, repeat themselves or come too late: compare-and-set, idempotency keys, the history of it all."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import pytest

from tests.services import PostgresServer, RedisServer, wait_until
from tests.web import Web, start_web, stop_web

MODELS = "/v1/configs/models"
KEY = "Idempotency-Key"


@dataclass
class Written:
    """A web tier, and a way past it to its database."""

    web: Web
    database_url: str

    def post(self, model: str, **headers: str) -> httpx.Response:
        return self.web.http.post(MODELS, json=document(model), headers=headers)

    def epoch(self) -> int:
        return int(self.web.http.get("/v1/configs/epoch").json()["epoch"])

    def history(self, **query: Any) -> Any:
        return self.web.http.get("/v1/configs/history", params=query).json()

    def database(self) -> "psycopg.Connection[Any]":
        return psycopg.connect(self.database_url)


def document(model: str, **fields: Any) -> dict[str, Any]:
    return {"id": model, "family": "dense", "source": {"hub": "org/m"}, **fields}


@pytest.fixture(scope="module")
def writes(redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: Any) -> Iterator[Written]:
    database_url = postgres_server.fresh_database()
    web = start_web(
        redis_server.url, tmp_path_factory.mktemp("configs"), (), DATABASE_URL=database_url, WEB_PROCESSES="2"
    )
    yield Written(web, database_url)
    stop_web(web)


def test_a_write_meant_for_another_epoch_is_refused(writes: Written) -> None:
    now = writes.post("match/1").json()["epoch"]
    late = writes.post("match/2", **{"If-Match": f'"{now - 1}"'})
    assert late.status_code == 409
    assert late.headers["X-SIE-Error-Code"] == "EPOCH_CONFLICT"
    assert late.json()["detail"]["error"] == "epoch_conflict"
    assert (late.json()["error"]["expected"], late.json()["error"]["current"]) == (now - 1, now)
    assert writes.post("match/2", **{"If-Match": str(now)}).json()["epoch"] == now + 1
    assert writes.post("match/3", **{"If-Match": "*"}).json()["epoch"] == now + 2
    for method, path, body in (
        ("PUT", f"{MODELS}/match/1", document("match/1", max_length=5)),
        ("PATCH", f"{MODELS}/match/1", {"max_length": 5}),
        ("DELETE", f"{MODELS}/match/1", None),
        ("POST", "/v1/configs/rollback", {"epoch": now}),
    ):
        refused = writes.web.http.request(method, path, json=body, headers={"If-Match": f'W/"{now}"'})
        assert refused.status_code == 409, method
    assert writes.epoch() in (now + 1, now + 2)


def test_of_many_writers_of_one_epoch_one_wins(writes: Written) -> None:
    now = writes.post("race/0").json()["epoch"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda at: writes.post(f"race/{at}", **{"If-Match": str(now)}), range(1, 17)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 15


def test_many_writers_lose_nothing(writes: Written) -> None:
    """Every one gets an epoch of its own, without a gap, and each is in the history."""
    now = writes.post("many/0").json()["epoch"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda at: writes.post(f"many/{at}"), range(1, 49)))
    assert {answer.status_code for answer in answers} == {201}
    assert sorted(answer.json()["epoch"] for answer in answers) == list(range(now + 1, now + 49))
    entries = writes.history(limit=48)["entries"]
    told = {entry["epoch"]: entry["changes"][0]["name"] for entry in entries}
    assert told == {answer.json()["epoch"]: answer.json()["model_id"] for answer in answers}


def test_a_repeated_write_is_answered_alike_and_done_once(writes: Written) -> None:
    first = writes.post("key/1", **{KEY: "k-1"})
    writes.web.http.delete(f"{MODELS}/key/1")
    again = writes.post("key/1", **{KEY: "k-1"})
    assert (again.status_code, again.content) == (first.status_code, first.content) == (201, first.content)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers
    assert writes.web.http.get(f"{MODELS}/key/1").status_code == 404
    for other in (
        writes.post("key/2", **{KEY: "k-1"}),
        writes.web.http.delete(f"{MODELS}/key/1", headers={KEY: "k-1"}),
        writes.web.http.put(f"{MODELS}/key/1", json=document("key/1"), headers={KEY: "k-1"}),
    ):
        assert other.status_code == 422
        assert other.headers["X-SIE-Error-Code"] == "IDEMPOTENCY_MISMATCH"
        assert other.json()["detail"]["error"] == "idempotency_mismatch"


def test_duplicates_at_once_are_one_write(writes: Written) -> None:
    before = writes.post("dup/0").json()["epoch"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: writes.post("dup/1", **{KEY: "dup"}), range(16)))
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
    assert sum("Idempotency-Replayed" in answer.headers for answer in answers) == 15
    assert answers[0].json()["epoch"] == before + 1
    assert writes.post("dup/2").json()["epoch"] == before + 2


def test_an_error_is_not_kept(writes: Written) -> None:
    assert writes.web.http.delete(f"{MODELS}/later/1", headers={KEY: "later"}).status_code == 404
    writes.post("later/1")
    assert writes.web.http.delete(f"{MODELS}/later/1", headers={KEY: "later"}).status_code == 200


def test_keys_survive_a_restart_and_end_after_a_day(
    writes: Written, redis_server: RedisServer, tmp_path_factory: Any
) -> None:
    first = writes.post("kept/1", **{KEY: "kept"})
    other = start_web(redis_server.url, tmp_path_factory.mktemp("other"), (), DATABASE_URL=writes.database_url)
    try:
        again = other.http.post(MODELS, json=document("kept/1"), headers={KEY: "kept"})
        assert (again.content, again.headers["Idempotency-Replayed"]) == (first.content, "true")
    finally:
        stop_web(other)
    with writes.database() as database:
        database.execute("update idempotency set at = now() - interval '25 hours' where key = 'kept'")
        database.execute("insert into idempotency values ('anonymous', 'old', '', 200, '', now() - interval '2 days')")
    anew = writes.post("kept/2", **{KEY: "kept"})
    assert (anew.status_code, anew.json()["model_id"]) == (201, "kept/2")
    with writes.database() as database:
        assert database.execute("select count(*) from idempotency where key = 'old'").fetchone() == (0,)


def test_a_write_that_is_cut_off_leaves_no_trace(writes: Written) -> None:
    """Its connection ends before the commit: neither the change nor the key stands."""
    before = writes.post("cut/0").json()["epoch"]
    with writes.database() as held, ThreadPoolExecutor(1) as pool:
        held.execute("select * from farm_epoch for update")
        under_way = pool.submit(lambda: writes.post("cut/1", **{KEY: "cut"}))
        with writes.database() as other:
            other.autocommit = True
            waiting = "select pid from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            wait_until(lambda: other.execute(waiting).fetchall(), 10, "the write to wait for the lock")
            for (pid,) in other.execute(waiting).fetchall():
                other.execute("select pg_terminate_backend(%s)", [pid])
        answer = under_way.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "CONFIG_UNAVAILABLE")
        assert answer.json()["detail"]["error"] == "registry_unavailable"
        assert int(answer.headers["Retry-After"]) > 0
    again = writes.post("cut/1", **{KEY: "cut"})
    assert (again.status_code, again.json()["epoch"]) == (201, before + 1)


def test_the_history_tells_who_and_why(writes: Written) -> None:
    writes.post("who/1", **{"X-Farmhand-Actor": "ci-robot", "X-Farmhand-Reason": "neues Modell für die Suche".encode()})
    writes.web.http.patch(f"{MODELS}/who/1", json={"max_length": 64})
    writes.web.http.delete(f"{MODELS}/who/1")
    removed, changed, added = writes.history(model="who/1")["entries"]
    assert (added["actor"], added["reason"]) == ("ci-robot@127.0.0.1", "neues Modell für die Suche")
    assert (changed["actor"], changed["reason"]) == ("anonymous@127.0.0.1", f"PATCH {MODELS}/who/1")
    assert [entry["changes"][0]["action"] for entry in (removed, changed, added)] == ["removed", "changed", "added"]
    assert changed["changes"][0]["fields"] == [{"path": "max_length", "new": 64}]
    assert removed["epoch"] == changed["epoch"] + 1 == added["epoch"] + 2
    assert len({entry["epoch_id"] for entry in (removed, changed, added)}) == 3
    assert added["at"].endswith(("Z", "+00:00"))


def test_the_history_is_paged(writes: Written) -> None:
    for at in range(5):
        writes.post(f"page/{at}")
    whole = [entry["epoch"] for entry in writes.history(limit=200)["entries"]]
    assert whole == sorted(whole, reverse=True)
    paged: list[int] = []
    before = None
    while len(paged) < 5:
        page = writes.history(limit=2, **({"before": before} if before else {}))
        paged += [entry["epoch"] for entry in page["entries"]]
        before = page["before"]
    assert paged[:5] == whole[:5]
    assert writes.history(before=1)["before"] is None


def test_a_rollback_is_a_new_epoch_with_old_contents(writes: Written) -> None:
    old = writes.post("roll/kept").json()["epoch"]
    writes.post("roll/new")
    writes.web.http.patch(f"{MODELS}/roll/kept", json={"max_length": 64})
    between = writes.web.http.get("/v1/configs/diff", params={"from": old}).json()
    assert [(one["name"], one["action"]) for one in between["changes"]] == [
        ("roll/kept", "changed"),
        ("roll/new", "added"),
    ]
    assert between["to"] == old + 2
    back = writes.web.http.post("/v1/configs/rollback", json={"epoch": old})
    assert (back.status_code, back.json()["epoch"], back.json()["rolled_back_to"]) == (200, old + 3, old)
    assert {one["name"] for one in back.json()["changes"]} == {"roll/kept", "roll/new"}
    nothing = writes.web.http.get("/v1/configs/diff", params={"from": old, "to": old + 3}).json()
    assert nothing["changes"] == []
    again = writes.web.http.post("/v1/configs/rollback", content=f"epoch: {old}")
    assert (again.json()["epoch"], again.json()["changed"]) == (old + 3, False)


@pytest.mark.parametrize("body", [{"epoch": 10**6}, {"epoch": -1}, {"epoch": 2**63 - 1}, {"epoch": "1"}, {}, []])
def test_a_rollback_to_no_epoch_is_refused(writes: Written, body: Any) -> None:
    refused = writes.web.http.post("/v1/configs/rollback", content=json.dumps(body))
    assert refused.status_code in (404, 422)
    assert refused.json()["error"]["message"]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_what_a_newer_release_wrote_is_not_taken_away(writes: Written, method: str) -> None:
    name = f"newer/{method.lower()}"
    writes.post(name)
    with writes.database() as database:
        database.execute(
            """update models set spec = spec || '{"novel": 1, "limits": {"of_then": 2}}' where id = %s""", [name]
        )
    change = {"max_length": 7} if method == "PATCH" else {"id": name, "profiles": {"p": {"max_length": 7}}}
    refused = writes.web.http.request(method, f"{MODELS}/{name}" if method == "PATCH" else MODELS, json=change)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "CONTENT_CONFLICT")
    assert set(refused.json()["detail"]["newer_fields"]) == {"novel", "limits.of_then"}
    with writes.database() as database:
        (spec,) = database.execute("select spec from models where id = %s", [name]).fetchone() or ({},)
    assert (spec["novel"], spec["limits"], spec.get("max_length")) == (1, {"of_then": 2}, None)
    assert writes.web.http.put(f"{MODELS}/{name}", json=document(name)).status_code == 200


def test_however_much_is_left_out_an_answer_is_short(writes: Written) -> None:
    """It is kept for a day."""
    unknown = {f"unknown-{n}": 0 for n in range(5_000)} | {"x" * 10_000: 0}
    theirs = {
        "model_id": "many/m",
        "hf_id": "org/m",
        "profiles": {"default": {"adapter_path": "bert_flash"}},
        **unknown,
    }
    answer = writes.web.http.post(MODELS, json=theirs)
    assert answer.status_code == 201, answer.text[:500]
    assert len(answer.content) < 20_000
    assert answer.json()["warnings"][-1].endswith("more of this kind")
