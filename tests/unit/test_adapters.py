"""Which adapter a request means, which requests share a micro-batch, and who waits while one is fetched."""

from typing import Any

import msgspec
import pytest

from common.errors import RequestError
from config_db.adapters import SETTING, adapter_digest, adapter_source, name_adapter
from config_db.families import ADAPTABLE, FAMILIES
from config_db.spec import ModelSpec, Source
from tasks.batching import batch_key, shared_key
from tasks.messages import Request, Ticket, encode_body
from tasks.names import Operation
from workers.adapters import AdapterFetches
from workers.host.jobs import groups

LAW, MONEY = Source(hub="org/law", revision="v1"), Source(path="/models/money")
SPEC = ModelSpec(id="org/m", family="dense", source=Source(hub="org/m"), adapters={"law": LAW, "Money-2": MONEY})


def name(options: dict[str, Any], *, spec: ModelSpec = SPEC, **settings: Any) -> tuple[str | None, dict[str, Any]]:
    return name_adapter(spec, settings, options, param="params.options")


def test_a_name_becomes_the_source_and_its_digest() -> None:
    digest, options = name({"lora": "law", "normalize": True})
    assert digest == adapter_digest(LAW)
    assert options == {"normalize": True, "lora": {"hub": "org/law", "revision": "v1"}}
    assert adapter_source(options) == LAW
    assert name({"lora_id": "law"})[0] == digest
    assert name({"lora": None, "lora_id": None, "normalize": True}) == (None, {"normalize": True})


def test_the_digest_is_the_source_s_and_not_the_name_s() -> None:
    other = msgspec.structs.replace(SPEC, adapters={"law": MONEY, "same": LAW})
    assert name({"lora": "law"}, spec=other)[0] == adapter_digest(MONEY)
    assert name({"lora": "same"}, spec=other)[0] == name({"lora": "law"})[0]
    revisions = {adapter_digest(Source(hub="org/law", revision=revision)) for revision in (None, "v1", "v2")}
    assert len(revisions) == 3


@pytest.mark.parametrize(
    ("settings", "lora", "allowed"),
    [
        ({}, "team/x", False),
        ({SETTING: {"patterns": ["team/*"]}}, "team/x", True),
        ({SETTING: {"patterns": ["team/*"]}}, "other/x", False),
        ({SETTING: {"patterns": ["*"]}}, "../../etc", False),
        ({SETTING: {"patterns": ["*"]}}, "a" * 300, False),
        ({SETTING: {"patterns": "team/*"}}, "team/x", False),
        ({"catalog.allow": {"patterns": ["team/*"]}}, "team/x", False),
    ],
)
def test_a_repository_is_allowed_by_its_own_setting_alone(settings: dict[str, Any], lora: str, allowed: bool) -> None:
    if allowed:
        assert name({"lora": lora}, **settings)[1] == {"lora": {"hub": lora}}
        return
    with pytest.raises(RequestError, match="has no adapter"):
        name({"lora": lora}, **settings)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(RequestError) as refused:
        name({"lora_id": "money2"})
    assert (refused.value.param, refused.value.details) == ("params.options.lora_id", {"nearest": ["Money-2"]})
    with pytest.raises(RequestError, match="it has none"):
        name({"lora": "law"}, spec=msgspec.structs.replace(SPEC, adapters={}))


def test_families_that_take_none_say_so() -> None:
    without = next(family for family in FAMILIES if family not in ADAPTABLE)
    with pytest.raises(RequestError, match="takes no adapters"):
        name({"lora": "law"}, spec=msgspec.structs.replace(SPEC, family=without))
    assert name({"lora": "law"}, spec=msgspec.structs.replace(SPEC, family="an-operator-s-own"))[0]


def test_requests_share_a_micro_batch_whatever_adapter_they_have_but_not_with_the_base() -> None:
    def key(adapter: str | None, **options: Any) -> str:
        return shared_key(batch_key("org/m", "0123", Operation.ENCODE, adapter, options))

    assert key("a") == key("b")
    assert len({key("a"), key(None), key("a", pooling="cls"), key(None, pooling="cls")}) == 4
    assert shared_key("what another producer wrote") == "what another producer wrote"


class Host:
    def __init__(self, number: int) -> None:
        self.id, self.outstanding = number, 0


class Hosts:
    """Hosts that are asked for adapters and say nothing."""

    def __init__(self, *numbers: int) -> None:
        self.there = [Host(number) for number in numbers]
        self.asked: list[tuple[int, str]] = []

    def hosts(self) -> list[Host]:
        return self.there

    def fetch(self, host: int, adapter: str, source: Source) -> None:  # noqa: ARG002 - as the pool has it
        self.asked.append((host, adapter))


class Held:
    """A held request for an adapter."""

    def __init__(self, source: Source, deadline: float = 100.0) -> None:
        options = {"lora": msgspec.to_builtins(source)}
        self.body = encode_body("org/m", Request(items=[{"text": "a"}], options=options))
        self.ticket = Ticket(
            model="org/m", spec="", operation=Operation.ENCODE, key="", items=1, tokens=1, deadline=0, published=0,
            adapter=adapter_digest(source),
        )  # fmt: skip
        self.deadline, self.is_settling, self.error = deadline, False, ""


class Settler:
    def fail(self, held: Held, error: Any) -> None:
        held.is_settling, held.error = True, error.code


def fetches(*hosts: int) -> tuple[AdapterFetches, Hosts, list[Any]]:
    went_on: list[Any] = []
    made: Any = AdapterFetches(Settler(), lambda held, _: went_on.append(held))  # type: ignore[arg-type]
    made.hosts = Hosts(*hosts)
    return made, made.hosts, went_on


def test_one_fetch_serves_all_who_wait_and_nobody_waits_afterwards() -> None:
    made, hosts, went_on = fetches(1)
    waiting: list[Any] = [Held(Source(hub="org/law")) for _ in range(3)]
    assert all(made.keep(one, SPEC) for one in waiting)
    digest = waiting[0].ticket.adapter
    assert (hosts.asked, went_on) == ([(1, digest)], [])
    made.on_fetched(digest, None)
    assert went_on == waiting
    assert not made.keep(waiting[0], SPEC)
    local: Any = Held(Source(path="/models/law"))
    assert not made.keep(local, SPEC)


def test_a_fetch_outlives_its_host_and_the_deadline_of_who_asked() -> None:
    made, hosts, went_on = fetches()
    late: Any = Held(Source(hub="org/law"), deadline=5.0)
    patient: Any = Held(Source(hub="org/law"))
    assert made.keep(late, SPEC)
    assert made.keep(patient, SPEC)
    assert hosts.asked == []
    hosts.there = [Host(1)]
    made.tick(4.0)
    made.on_host_lost(1)
    hosts.there = [Host(2)]
    made.tick(5.0)
    assert [host for host, _ in hosts.asked] == [1, 2]
    assert (late.error, patient.error) == ("LORA_LOADING", "")
    made.on_fetched(patient.ticket.adapter, None)
    assert went_on == [patient]


def test_a_fetch_that_failed_is_not_tried_again_at_once() -> None:
    made, hosts, went_on = fetches(1)
    one: Any = Held(Source(hub="org/law"))
    made.keep(one, SPEC)
    made.on_fetched(one.ticket.adapter, {"code": "MODEL_LOAD_FAILED", "message": "no", "permanent": True})
    again: Any = Held(Source(hub="org/law"))
    assert made.keep(again, SPEC)
    assert (one.error, again.error) == ("MODEL_LOAD_FAILED", "MODEL_LOAD_FAILED")
    assert (len(hosts.asked), went_on) == (1, [])


class Rack:
    """A base with adapters; ``model`` stands for the base with them."""

    def __init__(self, *, mixes: bool) -> None:
        self.mixes, self.model = mixes, "adapted"


class Base:
    def __init__(self, *, mixes: bool) -> None:
        self.rack = Rack(mixes=mixes)


@pytest.mark.parametrize(("mixes", "adapted"), [(True, [[1, 2, 4]]), (False, [[1, 4], [2]])])
def test_parts_without_an_adapter_run_on_the_base_itself(mixes: bool, adapted: list[list[int]]) -> None:
    base: Any = Base(mixes=mixes)
    names = [None, "a", "b", None, "a"]
    requests = {at: Request(items=[], options={"lora": name} if name else {}) for at, name in enumerate(names)}
    assert groups(base, requests) == [(base, [0, 3]), *(("adapted", places) for places in adapted)]
    assert groups(base, {0: requests[0]}) == [(base, [0])]
