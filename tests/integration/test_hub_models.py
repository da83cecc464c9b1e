"""Models that nobody has written down, from a stand-in for the Hub: looked up, registered, bounded, served."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from huggingface_hub import close_session
from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from common.errors import CapacityError, FarmError, ModelLoadError, ModelNotFoundError, ModelUnsupportedError
from config_db.auto import SETTING, Allow, Registrar, read_allow
from config_db.catalog import apply_models
from config_db.engine import transaction
from config_db.hub import MAX_FILE_BYTES, Hub
from config_db.publish import Delete, Put, publish
from config_db.schema import EpochRow, HistoryRow, ModelRow
from config_db.spec import ModelSpec, Profile, Source
from tests.hub import BERT, COMMIT, ENCODER, GATED, HIDDEN, HubStandIn, Refusal, serving_hub
from tests.services import wait_until
from tests.standin import StandIn, vector_of
from tests.web import Web, start_web, stop_web

ALLOW = Allow(patterns=("org/*",))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    close_session()
    with serving_hub() as hub:
        hub.repositories["org/m"] = ENCODER
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
    close_session()


THEN = uuid4()
"""The epoch of a snapshot that lacks what is asked for."""


def registrar(engine: Engine, hub: HubStandIn) -> Registrar:
    """As each web process has one."""
    return Registrar(engine, Hub(hub.url).describe)


def rows(engine: Engine) -> dict[str, str]:
    """Origins of the models in the table, by id."""
    with Session(engine) as session:
        found = session.execute(select(ModelRow.id, ModelRow.origin).where(ModelRow.deleted_at.is_(None)))
        return {name: origin for name, origin in found}  # noqa: C416 - rows, not pairs


def epochs(engine: Engine) -> list[tuple[int, str]]:
    with Session(engine) as session:
        return [(number, actor) for number, actor in session.execute(select(EpochRow.number, EpochRow.actor))]


# -- what the Hub says -----------------------------------------------------------------------------------------------


def test_a_repository_becomes_a_spec_at_its_commit(hub: HubStandIn) -> None:
    spec = Hub(hub.url).describe("org/m")
    assert spec == ModelSpec(
        id="org/m",
        family="dense",
        source=Source(hub="org/m", revision=COMMIT),
        dims={"dense": 8},
        max_length=512,
    )
    files = [path for path in hub.asked if "resolve" in path]
    assert all(COMMIT in path for path in files)
    assert not any("safetensors" in path for path in files)


REFUSALS: dict[str, tuple[Any, type[FarmError], str]] = {
    "gated": (GATED, ModelLoadError, "HF_TOKEN"),
    "refused": (Refusal(403), ModelLoadError, "HF_TOKEN"),
    "hidden": (HIDDEN, ModelNotFoundError, "the Hub has none"),
    "missing": (Refusal(404, {"X-Error-Code": "RepoNotFound"}), ModelNotFoundError, "the Hub has none"),
    "busy": (Refusal(429, {"Retry-After": "37"}), CapacityError, "patience"),
    "broken": (Refusal(500), CapacityError, "does not answer"),
    "unknown family": ({"config.json": {**BERT, "architectures": ["GPTForCausalLM"]}}, ModelUnsupportedError, "GPTFor"),
    "pickle": ({"config.json": BERT, "pytorch_model.bin": None}, ModelUnsupportedError, "no safetensors"),
    "pickled heads": (
        {"config.json": BERT, "pytorch_model.bin": None, "colbert_linear.pt": None, "sparse_linear.pt": None},
        ModelUnsupportedError,
        r"trust\.formats: \[safetensors, pickle\]",
    ),
    "encoder gone": (
        {"gliner_config.json": {"model_name": "org/gone"}, "model.safetensors": None},
        ModelUnsupportedError,
        "leave its encoder to 'org/gone'",
    ),
    "encoder is no repository": (
        {"gliner_config.json": {"model_name": "../secret"}, "model.safetensors": None},
        ModelUnsupportedError,
        "no Hub repository",
    ),
    "not JSON": ({"config.json": b"{", "model.safetensors": None}, ModelUnsupportedError, "not JSON"),
    "huge": ({"config.json": b" " * (MAX_FILE_BYTES + 1), "model.safetensors": None}, ModelUnsupportedError, "larger"),
    "no number": ({**ENCODER, "config.json": {**BERT, "hidden_size": "8"}}, ModelUnsupportedError, "no width"),
}


@pytest.mark.parametrize("there", REFUSALS)
def test_a_repository_that_cannot_be_served_is_refused_rightly(hub: HubStandIn, there: str) -> None:
    hub.repositories["org/m"], kind, said = REFUSALS[there]
    with pytest.raises(kind, match=said) as caught:
        Hub(hub.url).describe("org/m")
    if there == "busy":
        assert caught.value.retry_after_s == 37
    if kind is ModelLoadError:
        assert caught.value.details == {"error_class": "GATED", "permanent": True}


def test_files_behind_a_gate_are_the_gate(hub: HubStandIn) -> None:
    """The Hub tells of a gated repository to everyone; only its files need the token."""
    hub.files_refused["org/m"] = GATED
    with pytest.raises(ModelLoadError, match="licence"):
        Hub(hub.url).describe("org/m")


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_away_is_tried_again_later() -> None:
    with pytest.raises(CapacityError, match="does not answer"):
        Hub("http://127.0.0.1:9").describe("org/m")


def test_a_renamed_repository_is_named(hub: HubStandIn) -> None:
    hub.renamed["org/old"] = "org/m"
    with pytest.raises(ModelNotFoundError, match="calls it 'org/m'"):
        Hub(hub.url).describe("org/old")


@pytest.mark.parametrize("name", ["org/a/b", "org/..m", "org/-m-", "org/" + "m" * 150])
def test_what_can_be_no_repository_is_not_asked_for(hub: HubStandIn, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        Hub(hub.url).describe(name)
    assert hub.asked == []


# -- registering -----------------------------------------------------------------------------------------------------


def test_a_model_is_registered_at_an_epoch_of_its_own(engine: Engine, hub: HubStandIn) -> None:
    before = epochs(engine)
    found = registrar(engine, hub).find("org/m", allow=ALLOW, epoch_id=THEN)
    assert found is not None
    assert epochs(engine) == [*before, (found.epoch, "hub")]
    assert rows(engine) == {"org/m": "auto"}


@pytest.mark.parametrize("name", ["other/m", "ORG/m", "org", "org/m:fast", "org/" + "m" * 300])
def test_an_id_that_no_pattern_lets_in_is_not_looked_up(engine: Engine, hub: HubStandIn, name: str) -> None:
    assert registrar(engine, hub).find(name, allow=ALLOW, epoch_id=THEN) is None
    assert hub.asked == []


def test_many_requests_at_once_are_one_look_up_over_all_processes(engine: Engine, hub: HubStandIn) -> None:
    hub.silent.add("org/m")
    processes = [registrar(engine, hub) for _ in range(2)]
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(processes[n % 2].find, "org/m", allow=ALLOW, epoch_id=THEN) for n in range(20)]
        wait_until(lambda: hub.look_ups("org/m") == 1, what="the first look-up")
        hub.released.set()
        found = [one.result(30) for one in asked]
    assert hub.look_ups("org/m") == 1
    assert len({one.epoch for one in found if one is not None}) == 1
    assert None not in found


def test_a_refusal_is_remembered(engine: Engine, hub: HubStandIn) -> None:
    process = registrar(engine, hub)
    for _ in range(3):
        with pytest.raises(ModelNotFoundError):
            process.find("org/none", allow=ALLOW, epoch_id=THEN)
    assert hub.look_ups("org/none") == 1
    assert process.find("org/m", allow=ALLOW, epoch_id=THEN) is not None


def test_a_hub_that_asks_for_patience_is_left_alone(engine: Engine, hub: HubStandIn) -> None:
    hub.repositories["org/busy"] = Refusal(429, {"Retry-After": "37"})
    process = registrar(engine, hub)
    for name in ("org/busy", "org/m"):
        with pytest.raises(CapacityError) as caught:
            process.find(name, allow=ALLOW, epoch_id=THEN)
        assert 30 < (caught.value.retry_after_s or 0) <= 37
    assert hub.look_ups("org/m") == 0


def test_look_ups_are_bounded_by_the_minute(engine: Engine, hub: HubStandIn) -> None:
    process, allow = registrar(engine, hub), Allow(patterns=("*",), per_minute=3)
    for n in range(3):
        with pytest.raises(ModelNotFoundError):
            process.find(f"org/none{n}", allow=allow, epoch_id=THEN)
    with pytest.raises(CapacityError, match="within a minute") as caught:
        process.find("org/m", allow=allow, epoch_id=THEN)
    assert 0 < (caught.value.retry_after_s or 0) <= 60


def test_the_hub_fills_no_more_of_the_table_than_it_may(engine: Engine, hub: HubStandIn) -> None:
    with transaction(engine) as session:
        apply_models(session, [ModelSpec(id="own", family="dense", source=Source(path="/m"))], actor="t", reason="t")
    hub.repositories |= {f"org/m{n}": ENCODER for n in range(3)}
    process, allow = registrar(engine, hub), Allow(patterns=("org/*",), most=2)
    for n in range(2):
        assert process.find(f"org/m{n}", allow=allow, epoch_id=THEN) is not None
    with pytest.raises(ModelNotFoundError, match="of the 2 that the Hub may add"):
        process.find("org/m2", allow=allow, epoch_id=THEN)
    assert set(rows(engine)) == {"own", "org/m0", "org/m1"}


def test_what_this_release_cannot_serve_is_not_registered(engine: Engine, hub: HubStandIn) -> None:
    hub.repositories["org/m"] = REFUSALS["unknown family"][0]
    with pytest.raises(ModelUnsupportedError, match="do not say which family"):
        registrar(engine, hub).find("org/m", allow=ALLOW, epoch_id=THEN)
    assert rows(engine) == {}


def test_a_model_that_is_there_already_is_no_new_epoch(engine: Engine, hub: HubStandIn) -> None:
    first = registrar(engine, hub).find("org/m", allow=ALLOW, epoch_id=THEN)
    assert registrar(engine, hub).find("org/m", allow=ALLOW, epoch_id=THEN) == first
    assert hub.look_ups("org/m") == 1


def test_what_was_deleted_by_hand_stays_deleted_until_it_is_added(engine: Engine, hub: HubStandIn) -> None:
    """Even when its tombstone is gone."""

    def change(write: Put | Delete) -> None:
        with transaction(engine) as session:
            publish(session, [write], actor="ann", reason="t")

    assert registrar(engine, hub).find("org/m", allow=ALLOW, epoch_id=THEN) is not None
    change(Delete("model", "org/m"))
    for _ in range(2):
        with pytest.raises(ModelNotFoundError, match="was deleted here"):
            registrar(engine, hub).find("org/m", allow=ALLOW, epoch_id=THEN)
        with transaction(engine) as session:
            session.execute(delete(ModelRow).where(ModelRow.id == "org/m"))
    assert hub.look_ups("org/m") == 1
    change(Put("model", "org/m", {"id": "org/m", "family": "dense", "source": {"hub": "org/m"}}))
    assert registrar(engine, hub).find("org/m", allow=ALLOW, epoch_id=THEN) is not None


def test_what_was_found_is_remembered_for_the_epoch_that_lacks_it(engine: Engine, hub: HubStandIn) -> None:
    """A backup restored since knows nothing of it, at whatever number: then the table is asked again."""
    process = registrar(engine, hub)
    for _ in range(3):
        assert process.find("org/m", allow=ALLOW, epoch_id=THEN) is not None
    assert hub.look_ups("org/m") == 1
    with transaction(engine) as session:
        session.execute(delete(HistoryRow))
        session.execute(delete(ModelRow))
    assert process.find("org/m", allow=ALLOW, epoch_id=uuid4()) is not None
    assert rows(engine) == {"org/m": "auto"}


def test_a_look_up_that_is_killed_keeps_nobody_waiting(engine: Engine) -> None:
    class KilledError(BaseException):
        """As of a greenlet."""

    found = ModelSpec(id="org/m", family="dense", source=Source(hub="org/m"))
    answers: list[BaseException | ModelSpec] = [KilledError(), found]

    def describe(_: str) -> ModelSpec:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    process = Registrar(engine, describe)
    with pytest.raises(KilledError):
        process.find("org/m", allow=ALLOW, epoch_id=THEN)
    again = process.find("org/m", allow=ALLOW, epoch_id=THEN)
    assert again is not None
    assert again.spec == found


@pytest.mark.parametrize("content", [{}, {"patterns": "org/*"}, {"patterns": ["a"], "mots": 3}, {"most": 0}])
def test_a_missing_or_broken_setting_allows_nothing(content: dict[str, Any]) -> None:
    assert read_allow({SETTING: content}).patterns == ()


# -- through the API -------------------------------------------------------------------------------------------------


@pytest.fixture
def standin(redis_url: str) -> Iterator[StandIn]:
    standin = StandIn(redis_url).start()
    yield standin
    standin.stop()
    standin.redis.close()


@pytest.fixture
def allow_hub(engine: Engine) -> Callable[..., None]:
    """Publish the setting."""

    def allow(*patterns: str, **rest: Any) -> None:
        with transaction(engine) as session:
            setting = Put("setting", SETTING, {"patterns": list(patterns), **rest})
            publish(session, [setting], actor="test", reason="test")

    return allow


@pytest.fixture
def web(hub: HubStandIn, redis_url: str, database_url: str, tmp_path: Path) -> Iterator[Web]:
    """The real web tier, its Hub the stand-in."""
    assert hub.url  # in the environment by now
    web = start_web(redis_url, tmp_path, (), DATABASE_URL=database_url, CONFIG_POLL_S="0.1", STATE_DIR=str(tmp_path))
    yield web
    stop_web(web)


def encode(web: Web, model: str, **params: Any) -> Any:
    return web.http.post(f"/v1/encode/{model}", json={"items": [{"text": "hello"}], "params": params})


def test_the_hub_is_not_asked_unless_the_operator_says_so(web: Web, hub: HubStandIn) -> None:
    response = encode(web, "org/m")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "MODEL_NOT_FOUND")
    assert hub.asked == []


@pytest.mark.usefixtures("standin")
def test_a_model_of_the_hub_is_served_from_its_first_request_on(
    web: Web, hub: HubStandIn, engine: Engine, allow_hub: Callable[..., None]
) -> None:
    allow_hub("org/*")
    wait_until(lambda: encode(web, "org/none").status_code == 404 and hub.asked, what="the setting to be read")
    response = encode(web, "org/m")
    assert response.status_code == 200, response.text
    assert response.json()["items"][0]["dense"]["values"] == vector_of("hello")
    wait_until(lambda: web.http.get("/v1/models/org/m").status_code == 200, what="the model to be listed")
    assert web.http.get("/v1/models/org/m").json()["revision"] == COMMIT
    assert encode(web, "org/m").status_code == 200
    assert hub.look_ups("org/m") == 1
    with transaction(engine) as session:
        publish(session, [Delete("setting", SETTING)], actor="test", reason="test")
    assert encode(web, "org/m").status_code == 200


@pytest.mark.usefixtures("standin")
def test_a_hub_that_is_slow_holds_up_nobody_else(web: Web, hub: HubStandIn, allow_hub: Callable[..., None]) -> None:
    allow_hub("org/*")
    hub.repositories["org/slow"] = ENCODER
    hub.silent.add("org/slow")
    wait_until(lambda: encode(web, "org/m").status_code == 200, what="the setting to be read")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(encode, web, "org/slow")
        wait_until(lambda: hub.look_ups("org/slow") == 1, what="the slow look-up")
        assert encode(web, "org/m").status_code == 200
        assert web.http.get("/healthz").status_code == 200
        assert not slow.done()
        hub.released.set()
        assert slow.result(30).status_code == 200


@pytest.mark.parametrize(
    ("there", "status", "code"),
    [
        ("gated", 502, "MODEL_LOAD_FAILED"),
        ("hidden", 404, "MODEL_NOT_FOUND"),
        ("busy", 503, "RESOURCE_EXHAUSTED"),
        ("unknown family", 501, "MODEL_UNSUPPORTED"),
    ],
)
def test_refusals_reach_the_caller_with_their_status(
    web: Web, hub: HubStandIn, allow_hub: Callable[..., None], there: str, status: int, code: str
) -> None:
    hub.repositories["org/m"] = REFUSALS[there][0]
    allow_hub("org/*")
    wait_until(lambda: encode(web, "org/m") and hub.look_ups("org/m") == 1, what="the setting to be read")
    response = encode(web, "org/m")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert hub.look_ups("org/m") == 1
    if there == "busy":
        assert 30 < int(response.headers["Retry-After"]) <= 37


def test_an_unsupported_model_is_501_with_the_reason(web: Web, engine: Engine) -> None:
    specs = [
        ModelSpec(id="org/mine", family="mine", source=Source(hub="org/mine"), unsupported="waits for its licence"),
        ModelSpec(id="org/code", family="dense", source=Source(hub="org/code"), unsupported="needs code of its own"),
    ]
    with transaction(engine) as session:
        apply_models(session, specs, actor="test", reason="test")
    for spec, reason in zip(specs, ("waits for its licence", "needs code of its own"), strict=True):
        wait_until(lambda: encode(web, spec.id).status_code != 404, what="the models to be read")  # noqa: B023
        response = encode(web, spec.id)
        assert (response.status_code, response.json()["error"]["code"]) == (501, "MODEL_UNSUPPORTED")
        assert reason in response.json()["error"]["message"]


def test_a_profile_is_chosen_by_option_or_by_name(web: Web, engine: Engine, redis_url: str) -> None:
    spec = ModelSpec(id="org/p", family="dense", source=Source(hub="org/p"), profiles={"short": Profile(max_length=16)})
    with transaction(engine) as session:
        apply_models(session, [spec], actor="test", reason="test")
    wait_until(lambda: web.http.get("/v1/models/org/p").status_code == 200, what="the model to be read")
    standin = StandIn(redis_url).tell()
    short = spec.with_profile("short").digest
    asked = [
        ("org/p", {}, spec.digest),
        ("org/p", {"profile": "default"}, spec.digest),
        ("org/p", {"profile": "short"}, short),
        ("org/p:short", {}, short),
        ("org/p:short", {"profile": "short"}, short),
    ]
    with ThreadPoolExecutor(1) as pool:
        for model, options, digest in asked:
            waiting = pool.submit(encode, web, model, options=options)
            taken = standin.take()
            standin.answer(taken)
            assert taken.ticket.spec == digest
            assert waiting.result(30).status_code == 200
    standin.redis.close()
    response = encode(web, "org/p", options={"profile": "long"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "params.options.profile")
    assert "it has short" in response.json()["error"]["message"]
    assert encode(web, "org/p:long").status_code == 404
