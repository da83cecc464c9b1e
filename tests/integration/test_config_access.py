"""Pools, tenants and API keys in the config DB: leases, quotas, secrets."""

import hmac
import logging
import re
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from common.errors import ConfigError, ConfigUnavailableError, EpochConflictError, NotFoundError
from config_db import keys, pools, tenants
from config_db.access import DEFAULT_LEASE_S, DEFAULT_TENANT, KeySpec, PoolSpec, Quotas, TenantSpec
from config_db.engine import open_engine, time_now, transaction
from config_db.epochs import epoch_now
from config_db.publish import Put, live, publish
from config_db.schema import HistoryRow, Kind, Table
from tests.services import PostgresServer, wait_until

WHO: dict[str, Any] = {"actor": "ann", "reason": "test"}
POOL = PoolSpec(machine_profiles={"l4": 2, "cpu": 1}, client="ci")
SOON = timedelta(milliseconds=300)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """One transaction for the whole test."""
    with Session(engine) as opened:
        yield opened


def epoch(session: Session) -> int:
    return epoch_now(session)[0]


def content(session: Session, kind: Kind, name: str) -> dict[str, Any]:
    return live(session, kind)[name]


def add(session: Session, kind: Kind, name: str, spec: dict[str, Any]) -> None:
    publish(session, [Put(kind, name, spec)], **WHO)


def test_a_pool_is_made_changed_and_deleted_each_in_one_epoch(session: Session) -> None:
    first = epoch(session)
    made = pools.create(session, "team-a", POOL, **WHO)
    assert made.expires_at is None
    assert pools.get(session, "team-a") == made
    changed = pools.create(session, "team-a", PoolSpec(machine_profiles={"l4": 3}), **WHO)
    assert (changed.machine_profiles, changed.created_at) == ({"l4": 3}, made.created_at)
    assert pools.listed(session) == {"team-a": changed}
    pools.delete(session, "team-a", **WHO)
    assert pools.listed(session) == {}
    assert epoch(session) == first + 3
    told = session.execute(select(HistoryRow.kind, HistoryRow.name, HistoryRow.epoch).order_by(HistoryRow.id)).all()
    assert told == [("pool", "team-a", first + n) for n in (1, 2, 3)]


def test_a_lease_runs_from_now_and_ends_by_itself(session: Session) -> None:
    made = pools.lease(session, "p", POOL, **WHO)
    assert made.created_at is not None
    assert made.expires_at == made.created_at + timedelta(seconds=DEFAULT_LEASE_S)
    pools.lease(session, "p", PoolSpec(machine_profiles={"l4": 1}, lease_s=SOON.total_seconds()), **WHO)
    assert set(pools.listed(session)) == {"p"}
    wait_until(lambda: not pools.listed(session), 5, "the lease to end")
    before = epoch(session)
    for gone in (
        lambda: pools.get(session, "p"),
        lambda: pools.renew(session, "p", actor="ci"),
        lambda: pools.delete(session, "p", **WHO),
    ):
        with pytest.raises(NotFoundError) as caught:
            gone()
        assert caught.value.param == "pool"
    assert epoch(session) == before
    again = pools.lease(session, "p", POOL, **WHO)
    assert again.created_at is not None
    assert again.created_at > made.created_at


def test_the_sweep_takes_away_what_has_ended_in_one_epoch(session: Session) -> None:
    pools.create(session, "kept", POOL, **WHO)
    pools.lease(session, "leased", POOL, **WHO)
    for name in ("a", "b"):
        pools.lease(session, name, PoolSpec(machine_profiles={"l4": 1}, lease_s=SOON.total_seconds()), **WHO)
    assert pools.sweep(session, actor="farmhand") == []
    before = epoch(session)
    wait_until(lambda: set(pools.listed(session)) == {"kept", "leased"}, 5, "two leases to end")
    assert sorted(pools.sweep(session, actor="farmhand")) == ["a", "b"]
    assert epoch(session) == before + 1
    assert set(live(session, "pool")) == {"kept", "leased"}
    assert pools.sweep(session, actor="farmhand") == []
    assert epoch(session) == before + 1


def test_a_lease_is_renewed_once_it_is_well_under_way(session: Session) -> None:
    """Clients renew every minute, and every write is an epoch that all processes fetch."""
    made = pools.lease(session, "p", POOL, **WHO)
    before = epoch(session)
    assert pools.renew(session, "p", actor="ci") == made
    assert epoch(session) == before
    used = time_now(session) + timedelta(seconds=0.7 * DEFAULT_LEASE_S)
    add(
        session, "pool", "p", {**content(session, "pool", "p"), "expires_at": used.isoformat(), "of_a_newer_release": 1}
    )
    renewed = pools.renew(session, "p", actor="ci")
    assert epoch(session) == before + 2
    assert renewed.expires_at is not None
    assert renewed.expires_at > used + timedelta(seconds=0.2 * DEFAULT_LEASE_S)
    assert pools.get(session, "p") == renewed
    assert content(session, "pool", "p")["of_a_newer_release"] == 1


def test_a_permanent_pool_needs_no_renewal(session: Session) -> None:
    made = pools.create(session, "p", POOL, **WHO)
    before = epoch(session)
    assert pools.renew(session, "p", actor="ci") == made
    assert epoch(session) == before


@pytest.mark.parametrize(
    ("name", "spec", "param"),
    [
        ("Team-A", POOL, "name"),
        ("a.b", POOL, "name"),
        ("", POOL, "name"),
        ("a\n", POOL, "name"),
        ("a\0", POOL, "name"),
        ("x" * 65, POOL, "name"),
        ("p", PoolSpec(machine_profiles={}), "machine_profiles"),
        ("p", PoolSpec(machine_profiles={"l4": 0}), "machine_profiles.l4"),
        ("p", PoolSpec(machine_profiles={"l4": 1}, lease_s=-1), "lease_s"),
        ("p", PoolSpec(machine_profiles={"l4": 1}, tenant="nobody"), "tenant"),
        ("p", PoolSpec(machine_profiles={"l4": 1}, expires_at=datetime(2020, 1, 1, tzinfo=UTC)), "expires_at"),
        ("p", PoolSpec(machine_profiles={"l4": 1}, expires_at=datetime(2999, 1, 1)), "expires_at"),  # noqa: DTZ001 - refused for it
    ],
)
def test_a_pool_that_cannot_be_is_refused_by_its_field(session: Session, name: str, spec: PoolSpec, param: str) -> None:
    before = epoch(session)
    with pytest.raises(ConfigError) as caught:
        pools.create(session, name, spec, **WHO)
    assert caught.value.param == param
    assert epoch(session) == before


def test_nobody_finds_a_pool_that_is_not_there(session: Session) -> None:
    for name in ("p", "a\0b", "\ud800", "x" * 10_000):
        with pytest.raises(NotFoundError):
            pools.get(session, name)


def test_a_renewal_does_not_bring_back_a_deleted_pool(engine: Engine, session: Session) -> None:
    """It waits for the writer before it and then sees what that one did."""
    used = time_now(session) + timedelta(seconds=60)
    pools.create(session, "p", PoolSpec(machine_profiles={"l4": 1}, expires_at=used), **WHO)
    session.commit()
    errors: list[Exception] = []

    def renew() -> None:
        try:
            with transaction(engine) as other:
                pools.renew(other, "p", actor="ci")
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    pools.delete(session, "p", **WHO)
    thread = threading.Thread(target=renew)
    thread.start()
    wait_until(lambda: is_waiting(engine), 10, "the renewal to wait")
    session.commit()
    thread.join()
    assert [type(error) for error in errors] == [NotFoundError]
    assert pools.listed(session) == {}


def is_waiting(engine: Engine) -> bool:
    statement = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    with engine.connect() as connection:  # of its own: a transaction sees the same activity all along
        return bool(connection.execute(text(statement)).scalar())


def test_a_tenant_is_put_and_deleted(session: Session) -> None:
    spec = TenantSpec(weight=2.5, quotas=Quotas(in_flight=4, tokens_per_minute=1000), latency_classes=("batch",))
    first = epoch(session)
    tenants.put(session, "acme", spec, **WHO)
    assert tenants.get(session, "acme") == spec
    assert tenants.listed(session) == {DEFAULT_TENANT: TenantSpec(), "acme": spec}
    tenants.put(session, "acme", spec, **WHO)
    assert epoch(session) == first + 1
    tenants.delete(session, "acme", **WHO)
    assert set(tenants.listed(session)) == {DEFAULT_TENANT}
    assert epoch(session) == first + 2
    for missing in ("acme", "a\0b"):
        with pytest.raises(NotFoundError):
            tenants.get(session, missing)
        with pytest.raises(NotFoundError):
            tenants.delete(session, missing, **WHO)


def test_the_default_tenant_is_always_there(session: Session) -> None:
    assert tenants.get(session, DEFAULT_TENANT) == TenantSpec()
    tenants.put(session, DEFAULT_TENANT, TenantSpec(weight=7.0), **WHO)
    assert tenants.get(session, DEFAULT_TENANT).weight == 7.0
    tenants.delete(session, DEFAULT_TENANT, **WHO)
    assert tenants.get(session, DEFAULT_TENANT) == TenantSpec()


@pytest.mark.parametrize(
    ("name", "spec", "param"),
    [
        ("a b", TenantSpec(), "name"),
        ("../x", TenantSpec(), "name"),
        ("a", TenantSpec(weight=0), "weight"),
        ("a", TenantSpec(weight=float("nan")), "weight"),
        ("a", TenantSpec(weight=float("inf")), "weight"),
        ("a", TenantSpec(quotas=Quotas(queued=-1)), "quotas.queued"),
        ("a", TenantSpec(latency_classes=()), "latency_classes"),
        ("a", TenantSpec(note="x" * 10_001), "note"),
    ],
)
def test_a_tenant_that_cannot_be_is_refused_by_its_field(
    session: Session, name: str, spec: TenantSpec, param: str
) -> None:
    before = epoch(session)
    with pytest.raises(ConfigError) as caught:
        tenants.put(session, name, spec, **WHO)
    assert caught.value.param == param
    assert epoch(session) == before


def test_a_tenant_in_use_stays(session: Session) -> None:
    for name in ("a", "b", "c"):
        tenants.put(session, name, TenantSpec(), **WHO)
    key = keys.create(session, tenant="a", **WHO)
    pools.create(session, "p", PoolSpec(machine_profiles={"l4": 1}, tenant="b"), **WHO)
    for name, holds in (("a", f"key {key.id}"), ("b", "pool p")):
        with pytest.raises(ConfigError, match=f"still has {holds}: ") as caught:
            tenants.delete(session, name, **WHO)
        assert caught.value.param == "tenant"
    tenants.delete(session, "c", **WHO)
    keys.revoke(session, key.id, **WHO)
    pools.delete(session, "p", **WHO)
    tenants.delete(session, "a", **WHO)
    tenants.delete(session, "b", **WHO)
    assert set(tenants.listed(session)) == {DEFAULT_TENANT}


def test_a_key_opens_what_it_was_made_for(session: Session) -> None:
    tenants.put(session, "acme", TenantSpec(), **WHO)
    first = epoch(session)
    until = time_now(session) + timedelta(days=1)
    made = keys.create(
        session,
        tenant="acme",
        scopes=("infer", "jobs"),
        latency_class="batch",
        expires_at=until,
        note="nightly",
        **WHO,
    )
    assert epoch(session) == first + 1
    found = keys.find(session, made.key)
    assert found is not None
    key_id, spec = found
    assert key_id == made.id
    assert (spec.tenant, spec.scopes, spec.latency_class, spec.note) == ("acme", ("infer", "jobs"), "batch", "nightly")
    assert (spec.expires_at, spec.revoked_at) == (until, None)
    assert spec.prefix == f"fh_{made.id}"
    assert made.key.startswith(f"{spec.prefix}_")
    assert keys.listed(session) == {made.id: spec}
    assert epoch(session) == first + 1


def test_no_two_keys_are_alike(session: Session) -> None:
    made = [keys.create(session, tenant=DEFAULT_TENANT, **WHO) for _ in range(20)]
    assert len({one.id for one in made}) == len({one.key.rpartition("_")[2] for one in made}) == 20
    assert {len(bytes.fromhex(one.key.rpartition("_")[2])) for one in made} == {32}
    found = [keys.find(session, one.key) for one in made]
    assert [one is not None and one[0] for one in found] == [one.id for one in made]


def test_what_is_no_key_opens_nothing(session: Session) -> None:
    one, other = (keys.create(session, tenant=DEFAULT_TENANT, **WHO) for _ in range(2))
    secret = one.key.rpartition("_")[2]
    for presented in (
        "",
        "fh_",
        secret,
        one.id,
        f"fh_{one.id}",
        f"fh_{one.id}_",
        f"fh_{other.id}_{secret}",
        f"fh_{'0' * 16}_{secret}",
        f"fh_{one.id}_{'0' * 64}",
        one.key.upper(),
        one.key[:-1],
        one.key + "0",
        one.key + "\n",
        f" {one.key}",
        one.key.replace(secret, content(session, "key", one.id)["secret_sha256"]),
        "fh_\0_\0",
        "fh_ä_\ud800",
        "fh_" * 100_000,
    ):
        assert keys.find(session, presented) is None, presented[:100]
    assert keys.find(session, one.key) is not None


def test_a_revoked_key_opens_nothing_any_more(session: Session) -> None:
    made, other = (keys.create(session, tenant=DEFAULT_TENANT, **WHO) for _ in range(2))
    before = epoch(session)
    keys.revoke(session, made.id, **WHO)
    assert keys.find(session, made.key) is None
    assert keys.find(session, other.key) is not None
    revoked_at = keys.listed(session)[made.id].revoked_at
    assert revoked_at is not None
    keys.revoke(session, made.id, **WHO)
    assert keys.listed(session)[made.id].revoked_at == revoked_at
    assert epoch(session) == before + 1


def test_an_expired_key_opens_nothing_any_more(session: Session) -> None:
    made = keys.create(session, tenant=DEFAULT_TENANT, expires_at=time_now(session) + SOON, **WHO)
    assert keys.find(session, made.key) is not None
    wait_until(lambda: keys.find(session, made.key) is None, 5, "the key to expire")
    assert set(keys.listed(session)) == {made.id}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tenant": "nobody"}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"scopes": ()}, "scopes"),
        ({"scopes": ("infer", "root")}, "scopes[1]"),
        ({"latency_class": "fast"}, "latency_class"),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "expires_at"),
        ({"expires_at": datetime(2999, 1, 1)}, "expires_at"),  # noqa: DTZ001 - it is what is refused
        ({"note": "a\0"}, "note"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_its_field(session: Session, fields: dict[str, Any], param: str) -> None:
    before = epoch(session)
    with pytest.raises(ConfigError) as caught:
        keys.create(session, **{"tenant": DEFAULT_TENANT, **WHO, **fields})
    assert caught.value.param == param
    assert epoch(session) == before


def test_a_key_that_a_newer_release_has_restricted_opens_nothing(session: Session) -> None:
    """What this release does not know may be the very thing that forbids it; it can be revoked all the same."""
    made = keys.create(session, tenant=DEFAULT_TENANT, **WHO)
    add(session, "key", made.id, {**content(session, "key", made.id), "networks": ["10.0.0.0/8"]})
    assert keys.find(session, made.key) is None
    assert set(keys.listed(session)) == {made.id}
    keys.revoke(session, made.id, **WHO)
    written = content(session, "key", made.id)
    assert written["networks"] == ["10.0.0.0/8"]
    assert written["revoked_at"]


def test_a_secret_stands_nowhere(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Not in a row, nor in the history, a log (that of every SQL statement included) or a repr."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("sqlalchemy.engine").setLevel(logging.DEBUG)
    try:
        with capture_logs() as logs:
            with transaction(engine) as session:
                made = keys.create(session, tenant=DEFAULT_TENANT, **WHO)
            with transaction(engine) as session:
                assert keys.find(session, made.key) is not None
                assert keys.find(session, f"{made.key}0") is None
                keys.revoke(session, made.id, **WHO)
                assert keys.find(session, made.key) is None
                with pytest.raises(NotFoundError) as caught:
                    keys.revoke(session, made.key, **WHO)
    finally:
        logging.getLogger("sqlalchemy.engine").setLevel(logging.NOTSET)
    secret = made.key.rpartition("_")[2]
    with engine.connect() as connection:
        rows = [
            connection.execute(text(f"select t::text from {table.name} t")).scalars().all()  # noqa: S608 - our names
            for table in Table.metadata.sorted_tables
        ]
    told = [caplog.text, str(logs), repr(made), str(made), str(rows), "".join(traceback.format_exception(caught.value))]
    assert made.id in caplog.text
    assert made.id in str(rows)
    assert [text for text in told if secret[:12] in text] == []


def test_a_failed_creation_tells_no_secret(own_postgres: PostgresServer) -> None:
    engine = open_engine(own_postgres.fresh_database())
    with pytest.raises(EpochConflictError) as conflict, transaction(engine) as session:
        keys.create(session, tenant=DEFAULT_TENANT, expected=99, **WHO)
    made: list[keys.NewKey] = []

    def create_as_postgres_dies() -> None:
        with transaction(engine) as session:
            made.append(keys.create(session, tenant=DEFAULT_TENANT, **WHO))
            own_postgres.kill()

    with pytest.raises(ConfigUnavailableError) as away:
        create_as_postgres_dies()
    engine.dispose()
    assert made[0].key.rpartition("_")[2] not in "".join(traceback.format_exception(away.value))
    assert re.search("[0-9a-f]{64}", "".join(traceback.format_exception(conflict.value))) is None


def test_a_key_is_compared_whether_or_not_there_is_one(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison that takes as long for every wrong guess, so that timing tells nothing about keys."""
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    made = keys.create(session, tenant=DEFAULT_TENANT, **WHO)
    for presented in (made.key, f"fh_{made.id}_{'0' * 64}", f"fh_{'0' * 16}_{'0' * 64}"):
        keys.find(session, presented)
    assert compared == [(64, 64)] * 3


def test_keys_are_matched_without_the_config_db() -> None:
    """As the front door does, among those of its snapshot."""
    now = datetime.now(UTC)
    secret = "ab" * 32
    spec = KeySpec(tenant="a", secret_sha256=keys._hash(secret), prefix="fh_", created_at=now, expires_at=now + SOON)
    match = partial(keys.match, {"0" * 16: spec}, f"fh_{'0' * 16}_{secret}")
    assert match(now) == ("0" * 16, spec)
    assert match(now + SOON) is None


def test_many_at_once_lose_nothing(engine: Engine) -> None:
    made: list[str] = []

    def make() -> None:
        for _ in range(5):
            with transaction(engine) as session:
                one = keys.create(session, tenant=DEFAULT_TENANT, **WHO)
                keys.revoke(session, one.id, **WHO)
            made.append(one.id)

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Session(engine) as session:
        assert set(keys.listed(session)) == set(made)
        assert epoch(session) == 1 + 2 * len(made)
    assert len(made) == 15
