"""``/health`` and ``/ws/cluster-status``: what they say, to whom, at what cost, and how a watcher ends."""

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from simple_websocket import Client, ConnectionClosed
from simple_websocket import ConnectionError as HandshakeError
from sqlalchemy.orm import Session

from config_db import keys
from config_db.access import PoolSpec
from config_db.engine import open_engine
from config_db.snapshot import Snapshot
from config_db.spec import Access, ModelSpec, Source
from tasks.client import FarmClient
from tests.fakes.family import PLACE
from tests.services import RedisServer, wait_until
from tests.standin import QUEUE, SPECS, StandIn, StaticSnapshots
from tests.web import Web, start_web, stop_web
from webapp.cluster import Cluster, Viewer
from webapp.epoch_reports import EpochReports
from webapp.fleet import Fleet
from webapp.watchers import Watchers

KEY = "a-token-of-some-length"


@pytest.fixture(scope="module")
def web(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = {"WATCHERS": "20", "AUTH": "static", "AUTH_TOKENS": KEY, "EXTRA_FAMILIES": f"fake={PLACE}"}
    web = start_web(redis_server.url, tmp_path_factory.mktemp("web"), **settings)
    web.http.headers["Authorization"] = f"Bearer {KEY}"
    yield web
    stop_web(web)


@pytest.fixture
def standin(redis_url: str) -> Iterator[StandIn]:
    standin = StandIn(redis_url)
    yield standin
    standin.redis.close()


class Watcher(Client):  # type: ignore[misc]  # the library is untyped
    """A client that leaves no socket behind when it is refused."""

    def handshake(self) -> None:
        try:
            super().handshake()
        except HandshakeError:
            self.sock.close()
            raise


def watch(web: Web, **headers: str) -> Any:
    """A watcher; its handshake may be refused."""
    sent = {"Authorization": f"Bearer {KEY}", **headers}
    return Watcher.connect(f"ws://127.0.0.1:{web.port}/ws/cluster-status", headers=sent)


def heard(watcher: Any) -> Any:
    text = watcher.receive(timeout=20)
    assert isinstance(text, str), "nothing came"
    return json.loads(text)


def hear_to_the_end(watcher: Any) -> None:
    while True:
        heard(watcher)


def test_health_tells_who_is_there(web: Web, standin: StandIn) -> None:
    digests = [spec.digest for spec in SPECS]
    told = {"machine_profile": "cpu", "hosts": 2, "memory_used_bytes": 5, "memory_total_bytes": 9, "epoch_id": "e"}
    standin.tell(resident=[digests[0], "of-another-epoch"], **told)
    standin.redis.rpush(QUEUE, "x", "y")

    def answer() -> Any:
        response = web.http.get("/health")
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        return response.json()

    wait_until(lambda: answer()["workers"] and answer()["workers"][0]["queue_depth"] == 2, 5, "the worker to be seen")
    found = answer()
    assert (found["type"], found["status"], found["reasons"]) == ("gateway", "healthy", [])
    assert (found["configured_gpu_types"], found["live_gpu_types"]) == (["cpu"], ["cpu"])
    assert found["cluster"] == {"worker_count": 1, "gpu_count": 0, "models_loaded": 1, "total_qps": 0.0}
    (worker,) = found["workers"]
    assert worker == {
        "name": "stand-in",
        "url": "",
        "gpu": "cpu",
        "gpu_count": 0,
        "ready_gpu_slots": 2,
        "healthy": True,
        "queue_depth": 2,
        "loaded_models": ["org/m"],
        "memory_used_bytes": 5,
        "memory_total_bytes": 9,
        "bundle": "default",
        "bundle_config_hash": "e",
    }
    assert found["models"] == [
        {"name": "org/m", "state": "loaded", "worker_count": 1, "gpu_types": ["cpu"], "total_queue_depth": 0},
        {"name": "org/rank", "state": "available", "worker_count": 0, "gpu_types": [], "total_queue_depth": 0},
    ]
    standin.tell(ready=False, machine_profile="cpu")
    wait_until(lambda: answer()["status"] == "no_workers", 5, "the worker to be seen as not ready")
    assert (answer()["workers"][0]["healthy"], answer()["live_gpu_types"]) == (False, [])


def test_a_watcher_is_told_each_second(web: Web, standin: StandIn) -> None:
    with closing(watch(web)) as watcher:
        first = heard(watcher)
        assert set(first) == {"timestamp", "cluster", "workers", "models", "demand"}
        standin.tell(machine_profile="cpu")
        wait_until(lambda: heard(watcher)["cluster"]["worker_count"] == 1, 20, "the worker to be seen")
        assert heard(watcher)["timestamp"] > first["timestamp"]
        watcher.send("whatever it says is dropped")
        assert heard(watcher)["workers"][0]["name"] == "stand-in"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Authorization": ""}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Origin": "https://evil.example"}, 403)],
)
def test_who_may_not_watch_is_refused_at_the_handshake(web: Web, headers: dict[str, str], status: int) -> None:
    with pytest.raises(HandshakeError) as refused:
        watch(web, **headers)
    assert refused.value.status_code == status
    assert web.http.get("/health", headers=headers if status == 401 else {"Authorization": ""}).status_code == 401


def test_what_is_no_handshake_is_told_what_to_do(web: Web) -> None:
    plain = web.http.get("/ws/cluster-status")
    assert (plain.status_code, plain.json()["error"]["code"]) == (400, "INVALID_INPUT")
    half = web.http.get("/ws/cluster-status", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    assert (half.status_code, half.json()["error"]["code"]) == (400, "INVALID_INPUT")
    own = {"Origin": "http://127.0.0.1"}  # this client's Host header has no port
    with closing(watch(web, **own)) as watcher:
        assert heard(watcher)


def test_watchers_share_one_look_and_are_bounded(web: Web, standin: StandIn) -> None:
    standin.tell(machine_profile="cpu")
    with ExitStack() as stack:
        watchers = []
        wait_until(lambda: _opens(web, watchers, stack) == 20, 20, "as many watchers as there may be")
        with pytest.raises(HandshakeError) as refused:
            watch(web)
        assert refused.value.status_code == 503
        before = _looks(standin)
        for _ in range(3):
            for watcher in watchers:
                assert heard(watcher)["workers"]
        assert 1 <= _looks(standin) - before <= 8
        watchers[0].sock.shutdown(socket.SHUT_RDWR)  # as a client that is killed
        wait_until(lambda: _opens(web, watchers, stack) == 21, 10, "its place to be free")


def _opens(web: Web, watchers: list[Any], stack: ExitStack) -> int:
    """How many there are after one more has tried."""
    try:
        watcher = watch(web)
    except HandshakeError:
        return len(watchers)
    stack.callback(watcher.sock.close)
    watchers.append(watcher)
    return len(watchers)


def _looks(standin: StandIn) -> int:
    stats: Any = standin.redis.info("commandstats")
    return int(stats["cmdstat_zrangebyscore"]["calls"])


def test_a_shutdown_says_goodbye_to_watchers_at_once(redis_url: str, tmp_path: Path) -> None:
    web = start_web(redis_url, tmp_path)
    watcher = watch(web)
    heard(watcher)
    web.process.send_signal(signal.SIGTERM)
    with pytest.raises(ConnectionClosed) as ended:
        hear_to_the_end(watcher)
    assert ended.value.reason == 1001
    web.process.wait(6)
    assert "Traceback" not in web.log.read_text()
    web.http.close()


def test_a_revoked_key_ends_the_watching(redis_url: str, database_url: str, tmp_path: Path) -> None:
    engine = open_engine(database_url)
    who: Any = {"actor": "test", "reason": "test"}
    with Session(engine) as session, session.begin():
        made = keys.create(session, tenant="default", **who)
    web = start_web(redis_url, tmp_path, (), DATABASE_URL=database_url, AUTH="keys", CONFIG_POLL_S="0.2")
    watcher = watch(web, Authorization=f"Bearer {made.key}")
    assert heard(watcher)
    with Session(engine) as session, session.begin():
        keys.revoke(session, made.id, **who)
    with pytest.raises(ConnectionClosed) as ended:
        hear_to_the_end(watcher)
    assert ended.value.reason == 1008
    engine.dispose()
    stop_web(web)


def test_redis_away_is_a_degraded_farm_without_workers(own_redis: RedisServer, tmp_path: Path) -> None:
    web = start_web(own_redis.url, tmp_path)
    standin = StandIn(own_redis.url).tell(machine_profile="cpu")
    with closing(watch(web)) as watcher:
        assert heard(watcher)["workers"]
        own_redis.kill()
        wait_until(lambda: web.http.get("/health").json()["status"] == "degraded", 10, "Redis to be missed")
        found = web.http.get("/health").json()
        assert (found["workers"], found["live_gpu_types"], found["cluster"]["worker_count"]) == ([], [], 0)
        assert "Redis" in found["reasons"][0]
        own_redis.start()
        standin.tell(machine_profile="cpu")  # Redis may have lost its last second
        wait_until(lambda: heard(watcher)["workers"], 20, "the watcher to hear of it again")
    stop_web(web)


# -- who sees what, in one process ------------------------------------------------------------------------------------


def test_a_tenant_sees_its_own(client: FarmClient, redis_url: str) -> None:
    mine, theirs, common = (
        ModelSpec(id=f"org/{name}", family="dense", source=Source(path="/"), access=Access(tenants=tenants))
        for name, tenants in (("mine", ("me",)), ("theirs", ("they",)), ("common", ()))
    )
    served = Snapshot(
        1,
        uuid4(),
        {spec.id: spec for spec in (mine, theirs, common)},
        {"theirs": PoolSpec(machine_profiles={"l4": 1}, tenant="they")},
    )
    resident = [spec.digest for spec in (mine, theirs, common)]
    workers = [StandIn(redis_url), StandIn(redis_url)]
    workers[0].tell(machine_profile="cpu", resident=resident)
    workers[1].tell(node="reserved", machine_profile="l4", queues=["farm.theirs.l4.interactive"])
    for pool, model in (("theirs", "org/common"), ("default", "org/theirs")):
        client.record_demand(pool=pool, machine_profile="a100", model=model, default_start_s=1)
    cluster = Cluster(Fleet(client), client, lambda: served, machine_profile="cpu", extra_families={})
    me, they, operator = (cluster.health(Viewer(tenant)) for tenant in ("me", "they", None))
    assert [worker.name for worker in me.workers] == ["stand-in"]
    assert me.workers[0].loaded_models == [model.name for model in me.models] == ["org/common", "org/mine"]
    assert [(one.pool, one.model) for one in me.demand] == [("default", None)]
    assert me.configured_gpu_types == ["cpu", "l4"]
    assert {worker.name for worker in they.workers} == {"stand-in", "reserved"}
    assert they.configured_gpu_types == ["cpu", "l4"]
    assert [(one.pool, one.model) for one in operator.demand] == [("theirs", "org/common"), ("default", "org/theirs")]
    assert len(operator.models) == 3
    texts = [json.loads(cluster.status_text(Viewer(tenant))) for tenant in ("me", "they")]
    assert [len(text["workers"]) for text in texts] == [1, 2]
    for worker in workers:
        worker.redis.close()


def test_requests_a_second_are_those_of_all_web_processes(client: FarmClient, redis_url: str) -> None:
    other = FarmClient(redis_url, queue_limit=10, result_ttl_s=60)
    other.tell(machine_profile="cpu", epoch=1, epoch_id="e", requests_per_s=1000.0)
    client.requests += 5
    snapshots = StaticSnapshots()
    EpochReports(client, snapshots, machine_profile="cpu")._tell()  # type: ignore[arg-type]  # no reader
    cluster = Cluster(Fleet(client), client, lambda: snapshots.current, machine_profile="cpu", extra_families={})
    assert cluster.health(Viewer(None)).cluster.total_qps > 1000
    other.close()


# -- one watcher, over a pair of sockets ------------------------------------------------------------------------------


HANDSHAKE = {
    "HTTP_HOST": "farm",
    "HTTP_UPGRADE": "websocket",
    "HTTP_CONNECTION": "Upgrade",
    "HTTP_SEC_WEBSOCKET_KEY": "x3JJHMbDL1EzLkh9GBhXDw==",
    "HTTP_SEC_WEBSOCKET_VERSION": "13",
    "HTTP_SEC_WEBSOCKET_EXTENSIONS": "permessage-deflate",
}


def serve_aside(watchers: Watchers, inner: socket.socket, text: Callable[[], str]) -> threading.Thread:
    environ = {**HANDSHAKE, "gunicorn.socket": inner}
    thread = threading.Thread(target=watchers.serve, args=(environ, text), daemon=True)
    thread.start()
    return thread


def test_a_client_that_answers_nothing_is_dropped() -> None:
    watchers = Watchers(1, ping_s=0.2)
    inner, outer = socket.socketpair()
    with inner, outer:
        serving = serve_aside(watchers, inner, lambda: "x")
        outer.settimeout(10)
        assert outer.recv(4096).startswith(b"HTTP/1.1 101")
        serving.join(10)
        assert not serving.is_alive()
    assert len(watchers) == 0


def test_a_frame_is_sent_whole_to_a_slow_reader_and_uncompressed() -> None:
    """More than the socket's buffers hold; whoever takes it slowly gets every byte of it."""
    watchers, text = Watchers(1), "z" * 3_000_000
    inner, outer = socket.socketpair()
    with inner, outer:
        serving = serve_aside(watchers, inner, lambda: text)
        outer.settimeout(10)
        head = b""
        while b"\r\n\r\n" not in head:
            head += outer.recv(64)
        assert b"permessage-deflate" not in head
        got = head.partition(b"\r\n\r\n")[2]
        while len(got) < 10 + len(text):
            got += outer.recv(65536)
        assert got[:2] == b"\x81\x7f"  # a text of 64-bit length, final
        assert int.from_bytes(got[2:10], "big") == len(text)
        assert got[10 : 10 + len(text)] == text.encode()
        watchers.close()
        serving.join(10)
        assert not serving.is_alive()
