"""Who gets in: real HTTP, real keys in a real config DB, a real issuer of tokens on this machine."""

import base64
import hmac
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import redis
from cryptography.hazmat.primitives.asymmetric import rsa
from sqlalchemy.orm import Session

from config_db import keys, pools, tenants
from config_db.access import PoolSpec, TenantSpec
from config_db.catalog import apply_models
from config_db.engine import open_engine
from config_db.spec import Access, ModelSpec, Placement, Source
from tasks.names import LANES, Lane, queue_name
from tests.services import free_port, wait_until
from tests.standin import StandIn
from tests.web import Web, gunicorn, start_web, stop_web

TOKEN, ADMIN = "a-token-that-is-long", "an-admin-token-that-is-long"
BODY = {"items": [{"text": "x"}]}
AUDIENCE = "farmhand"
NOT_SERVED = (Lane.BATCH, Lane.EXPERIMENT)
RESERVED = Placement(tenants=("acme", "poor"))
WHO: Any = {"actor": "test", "reason": "test"}


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Web]]:
    """Web tiers of the test's own, and somebody who answers."""
    started: list[Web] = []
    standin = StandIn(redis_url).start()

    def make(application: tuple[str, ...] = ("tests.standin:build_web()",), **settings: str) -> Web:
        started.append(start_web(redis_url, tmp_path, application, **settings))
        return started[-1]

    yield make
    standin.stop()
    for web in started:
        stop_web(web)


def ask(web: Web, token: str | None, *, model: str = "org/m", path: str = "", **headers: str) -> httpx.Response:
    sent = {**headers, **({} if token is None else {"Authorization": f"Bearer {token}"})}
    return web.http.post(path or f"/v1/encode/{model}", json=BODY, headers=sent)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_without_a_token_nothing_but_probes_answers(start: Callable[..., Web]) -> None:
    web = start(AUTH="static", AUTH_TOKENS=TOKEN)
    for path in ("/v1/models", "/v1/configs/models", "/v1/tasks/x", "/v1/nothing"):
        response = web.http.get(path)
        assert code(response) == (401, "UNAUTHENTICATED"), path
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert web.http.get("/healthz").status_code == 200
    assert web.http.get("/readyz").status_code in (200, 503)


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer  {TOKEN}", TOKEN])
def test_a_static_token_opens(start: Callable[..., Web], header: str) -> None:
    web = start(AUTH="static", AUTH_TOKENS=f"another-token-also-long, {TOKEN}")
    assert web.http.post("/v1/encode/org/m", json=BODY, headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize("header", ["Bearer", "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer " + "x" * 8000])
def test_anything_else_does_not(start: Callable[..., Web], header: str) -> None:
    web = start(AUTH="static", AUTH_TOKENS=TOKEN)
    assert code(web.http.get("/v1/models", headers={"Authorization": header})) == (401, "UNAUTHENTICATED")
    assert TOKEN not in web.log.read_text()


def test_tokens_come_from_a_file_and_admin_tokens_may_write(start: Callable[..., Web], tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n\n")
    web = start(AUTH="static", AUTH_TOKENS_FILE=str(file), AUTH_ADMIN_TOKENS=ADMIN)
    assert ask(web, TOKEN).status_code == 200
    refused = ask(web, TOKEN, path="/v1/configs/models")
    assert code(refused) == (403, "FORBIDDEN")
    assert refused.json()["detail"]["error"] == "forbidden"
    assert web.http.get("/v1/configs/models").json()["detail"]["error"] == "unauthenticated"
    assert ask(web, ADMIN, path="/v1/configs/models").status_code not in (401, 403)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"AUTH": "static"}, "FARMHAND_AUTH_TOKENS"),
        ({"AUTH": "static", "AUTH_TOKENS": "short"}, "no secret"),
        ({"AUTH": "oidc"}, "FARMHAND_OIDC_ISSUER"),
    ],
)
def test_a_mode_that_lacks_what_it_needs_is_one_line(
    redis_url: str, database_url: str, tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    said = refusal(redis_url, tmp_path, "127.0.0.1", DATABASE_URL=database_url, **settings)
    assert says in said
    assert "Traceback" not in said


def test_other_networks_are_not_served_without_asking_for_a_key(redis_url: str, tmp_path: Path) -> None:
    said = refusal(redis_url, tmp_path, "0.0.0.0")  # noqa: S104 - what is refused
    assert "ask nobody for a key" in said
    assert "Traceback" not in said


def refusal(redis_url: str, directory: Path, host: str, **settings: str) -> str:
    """What a web tier says that does not start."""
    command, environment = gunicorn(redis_url, directory, free_port(), (), **settings)
    command[command.index("-b") + 1] = f"{host}:{free_port()}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    return done.stderr + done.stdout


# -- keys of the config DB -----------------------------------------------------------------------------------------


class KeyRing:
    """Makes and revokes keys behind the web tier's back."""

    def __init__(self, database_url: str) -> None:
        self.engine = open_engine(database_url)
        with Session(self.engine) as session, session.begin():
            for tenant in ("acme", "other"):
                tenants.put(session, tenant, TenantSpec(), **WHO)
            tenants.put(session, "slow", TenantSpec(latency_classes=("batch", "experiment")), **WHO)
            pools.create(session, "acmes-own", PoolSpec(machine_profiles={"cpu": 1}, tenant="acme"), **WHO)
            source = Source(path="/models")
            models = [
                ModelSpec(id="org/m", family="dense", source=source),
                ModelSpec(id="org/acmes", family="dense", source=source, access=Access(tenants=("acme",))),
                ModelSpec(id="org/reserved", family="dense", source=source, placement=RESERVED),
                ModelSpec(id="org/patient", family="dense", source=source, placement=Placement(latency_class="batch")),
            ]
            apply_models(session, models, **WHO)

    def create(self, tenant: str = "acme", **options: Any) -> keys.NewKey:
        with Session(self.engine) as session, session.begin():
            return keys.create(session, tenant=tenant, **options, **WHO)

    def revoke(self, key: keys.NewKey) -> None:
        with Session(self.engine) as session, session.begin():
            keys.revoke(session, key.id, **WHO)


@pytest.fixture
def ring(database_url: str) -> Iterator[KeyRing]:
    ring = KeyRing(database_url)
    yield ring
    ring.engine.dispose()


@pytest.fixture
def web(start: Callable[..., Web], ring: KeyRing, database_url: str) -> Web:
    """Asks for keys, and knows all that the ring has made so far at the latest when one of them opens."""
    assert ring.engine
    return start((), AUTH="keys", DATABASE_URL=database_url)


def opens(web: Web, key: keys.NewKey, status: int = 200) -> None:
    wait_until(lambda: web.http.get("/v1/models", headers=bearer(key)).status_code == status, 10, f"{status} for a key")


def bearer(key: keys.NewKey) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.key}"}


def test_a_key_opens_until_it_is_revoked(web: Web, ring: KeyRing) -> None:
    key = ring.create()
    opens(web, key)
    assert ask(web, key.key).status_code == 200
    assert code(ask(web, key.key[:-1] + ("0" if key.key[-1] != "0" else "1"))) == (401, "UNAUTHENTICATED")
    ring.revoke(key)
    opens(web, key, 401)
    assert key.key.rpartition("_")[2] not in web.log.read_text()


def test_scopes_and_classes_are_kept_to(web: Web, ring: KeyRing) -> None:
    infer, config, batch = ring.create(), ring.create(scopes=("config",)), ring.create(latency_class="batch")
    opens(web, batch)
    spec = {"model_id": "org/new", "family": "dense", "source": {"hub": "org/new"}}
    assert code(web.http.post("/v1/configs/models", json=spec, headers=bearer(infer))) == (403, "FORBIDDEN")
    assert web.http.get("/v1/configs/models", headers=bearer(infer)).status_code == 200
    assert code(web.http.get("/v1/configs/history", headers=bearer(infer))) == (403, "FORBIDDEN")
    assert web.http.post("/v1/configs/models", json=spec, headers=bearer(config)).status_code == 201
    assert code(ask(web, config.key)) == (403, "FORBIDDEN")
    history = web.http.get("/v1/configs/history?limit=1", headers=bearer(config)).json()
    assert f"key {config.id}" in json.dumps(history)
    assert code(ask(web, batch.key, **{"X-Priority": "interactive"})) == (403, "FORBIDDEN")
    below = {"X-Priority": "experiment", "Prefer": "respond-async"}
    assert ask(web, batch.key, **below).status_code == 202


def test_idempotency_keys_of_config_writes_are_the_caller_s_own(web: Web, ring: KeyRing) -> None:
    """Two pipelines that both count from 1 do not meet."""
    for at, key in enumerate([ring.create(scopes=("infer", "config")) for _ in range(2)]):
        opens(web, key)
        spec = {"model_id": f"org/new-{at}", "family": "dense", "source": {"hub": "org/new"}}
        headers = {**bearer(key), "Idempotency-Key": "1"}
        answers = [web.http.post("/v1/configs/models", json=spec, headers=headers) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        assert "Idempotency-Replayed" in answers[1].headers


def test_a_tenant_sees_its_own_models_and_tasks_only(web: Web, ring: KeyRing) -> None:
    acme, other = ring.create("acme"), ring.create("other")
    opens(web, other)
    names = {one["name"] for one in web.http.get("/v1/models", headers=bearer(acme)).json()["models"]}
    assert names == {"org/m", "org/patient", "org/acmes", "org/reserved"}
    names = {one["name"] for one in web.http.get("/v1/models", headers=bearer(other)).json()["models"]}
    assert names == {"org/m", "org/patient"}
    assert code(ask(web, other.key, model="org/acmes")) == (404, "MODEL_NOT_FOUND")
    assert code(web.http.get("/v1/models/org/acmes", headers=bearer(other))) == (404, "MODEL_NOT_FOUND")
    task = ask(web, acme.key, Prefer="respond-async").json()["task_id"]
    assert web.http.get(f"/v1/tasks/{task}?wait=10", headers=bearer(acme)).json()["state"] == "succeeded"
    unknown = web.http.get("/v1/tasks/none", headers=bearer(other)).json()["error"]
    for method in ("GET", "DELETE"):
        theirs = web.http.request(method, f"/v1/tasks/{task}", headers=bearer(other))
        assert code(theirs) == (404, "TASK_NOT_FOUND")
        assert theirs.json()["error"]["message"].replace(task, "none") == unknown["message"]


def test_a_reserved_model_runs_in_pools_of_its_tenants_only(web: Web, ring: KeyRing, redis_url: str) -> None:
    with Session(ring.engine) as session, session.begin():
        tenants.put(session, "poor", TenantSpec(), **WHO)
    acme, other, poor = ring.create("acme"), ring.create("other"), ring.create("poor")
    opens(web, poor)
    assert code(ask(web, other.key, model="org/reserved")) == (404, "MODEL_NOT_FOUND")
    assert code(web.http.get("/v1/models/org/reserved", headers=bearer(other))) == (404, "MODEL_NOT_FOUND")
    no_pool = ask(web, poor.key, model="org/reserved")
    assert code(no_pool) == (404, "NOT_FOUND")
    assert "it has none" in no_pool.json()["error"]["message"]
    for pool in ("default", "nobodys"):
        elsewhere = ask(web, acme.key, model="org/reserved", **{"X-SIE-Pool": pool})
        assert (code(elsewhere), elsewhere.json()["error"]["param"]) == ((404, "NOT_FOUND"), "X-SIE-Pool")
    worker = StandIn(redis_url)
    lanes = [queue_name("acmes-own", "cpu", lane) for lane in LANES]
    worker.tell(queues=lanes)
    below = {"Prefer": "respond-async", "X-Priority": "batch"}
    wait_until(lambda: ask(web, acme.key, model="org/reserved", **below).status_code == 202, 10, "the pool to be seen")
    for headers in (below, {**below, "X-SIE-Pool": "acmes-own"}):
        assert ask(web, acme.key, model="org/reserved", **headers).status_code == 202
    assert worker.redis.llen(queue_name("acmes-own", "cpu", Lane.BATCH)) == 3
    worker.redis.close()


def test_a_request_that_names_no_class_gets_its_models_or_one_its_tenant_may_use(
    web: Web, ring: KeyRing, redis_url: str
) -> None:
    key, slow = ring.create("acme"), ring.create("slow")
    opens(web, slow)
    with redis.Redis.from_url(redis_url) as waiting:

        def lane_of(key: keys.NewKey, model: str = "org/m", **headers: str) -> str:
            before = {lane: waiting.llen(queue_name("default", "cpu", lane)) for lane in NOT_SERVED}
            assert ask(web, key.key, model=model, Prefer="respond-async", **headers).status_code == 202
            grown = [lane for lane, was in before.items() if waiting.llen(queue_name("default", "cpu", lane)) > was]
            return "".join(grown)

        assert lane_of(key, "org/patient") == "batch"
        assert lane_of(key, "org/patient", **{"X-Priority": "experiment"}) == "experiment"
        assert lane_of(slow) == "batch"
        assert lane_of(slow, **{"X-Farmhand-Lane": "experiment"}) == "experiment"
    refused = ask(web, slow.key, **{"X-Farmhand-Lane": "standard"})
    assert code(refused) == (403, "FORBIDDEN")
    assert "batch, experiment" in refused.json()["error"]["message"]


# -- an issuer of tokens -------------------------------------------------------------------------------------------


class Issuer:
    """Signs tokens and shows its keys, as an OpenID Connect provider does."""

    def __init__(self) -> None:
        self.keys = {"one": rsa.generate_private_key(public_exponent=65537, key_size=2048)}
        self.fetched = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.endswith("openid-configuration"):
                    found: Any = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/keys"}
                else:
                    issuer.fetched += 1
                    found = {"keys": [issuer.shown(name) for name in issuer.keys]}
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def shown(self, name: str) -> dict[str, Any]:
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self.keys[name].public_key(), as_dict=True)
        return {**public, "kid": name, "alg": "RS256", "use": "sig"}

    def token(self, *, key: str = "one", **claims: Any) -> str:
        said = {"iss": self.url, "aud": AUDIENCE, "sub": "ann", "tenant": "acme", "exp": time.time() + 600, **claims}
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(said, self.keys[key], algorithm="RS256", headers={"kid": key})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.close()


def as_part(content: Any) -> str:
    """One part of a token."""
    return in_base64(json.dumps(content).encode())


def in_base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def test_tokens_of_the_issuer_open_and_no_others(start: Callable[..., Web], issuer: Issuer) -> None:
    web = start(AUTH="oidc", OIDC_ISSUER=issuer.url, OIDC_AUDIENCE=AUDIENCE)
    assert ask(web, issuer.token()).status_code == 200
    assert ask(web, issuer.token(scope="openid infer")).status_code == 200
    assert code(ask(web, issuer.token(scope="config"))) == (403, "FORBIDDEN")
    stranger = Issuer()
    stranger.close()
    header, payload, _ = issuer.token().split(".")
    bare = as_part({"alg": "none", "kid": "one"})
    public = jwt.algorithms.RSAAlgorithm.to_jwk(issuer.keys["one"].public_key())
    unsigned = f"{as_part({'alg': 'HS256', 'kid': 'one'})}.{payload}"
    confused = f"{unsigned}.{in_base64(hmac.digest(public.encode(), unsigned.encode(), 'sha256'))}"
    refused = {
        "expired": issuer.token(exp=time.time() - 60),
        "another's audience": issuer.token(aud="others"),
        "another issuer": issuer.token(iss="http://127.0.0.1:1"),
        "not yet": issuer.token(nbf=time.time() + 600),
        "no expiry": issuer.token(exp=None),
        "no tenant": issuer.token(tenant=None),
        "a tenant like a path": issuer.token(tenant="../acme"),
        "another's signature": stranger.token(iss=issuer.url),
        "no algorithm": f"{bare}.{payload}.",
        "no signature": f"{header}.{payload}.",
        "the public key as a secret": confused,
        "nonsense": "a.b.c",
    }
    assert {why: code(ask(web, token)) for why, token in refused.items()} == dict.fromkeys(
        refused, (401, "UNAUTHENTICATED")
    )
    assert ask(web, issuer.token(exp=time.time() - 5)).status_code == 200, "clocks may differ by half a minute"


def test_unknown_keys_do_not_make_us_ask_the_issuer_again_and_again(start: Callable[..., Web], issuer: Issuer) -> None:
    web = start(AUTH="oidc", OIDC_ISSUER=issuer.url, OIDC_AUDIENCE=AUDIENCE)
    assert ask(web, issuer.token()).status_code == 200
    issuer.keys["forged"] = issuer.keys["one"]
    token = issuer.token(key="forged")
    del issuer.keys["forged"]
    assert [ask(web, token).status_code for _ in range(20)] == [401] * 20
    assert issuer.fetched <= 2


def test_an_issuer_that_is_away_is_a_503(start: Callable[..., Web], issuer: Issuer) -> None:
    token = issuer.token()
    issuer.close()
    web = start(AUTH="oidc", OIDC_ISSUER=issuer.url, OIDC_AUDIENCE=AUDIENCE)
    response = ask(web, token)
    assert code(response) == (503, "AUTH_UNAVAILABLE")
    assert float(response.headers["Retry-After"]) > 0
