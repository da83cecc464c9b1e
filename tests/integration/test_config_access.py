"""Pools and tenants in the config DB: leases, quotas, who is whose; and many writers of them at once."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from common.errors import ConfigError, NotFoundError
from config_db import keys, pools, tenants
from config_db.access import DEFAULT_LEASE_S, DEFAULT_TENANT, PoolSpec, Quotas, TenantSpec
from config_db.engine import time_now, transaction
from config_db.publish import live
from config_db.schema import HistoryRow
from tests.config_writes import WHO, add, content, epoch
from tests.services import wait_until

POOL = PoolSpec(machine_profiles={"l4": 2, "cpu": 1}, client="ci")
SOON = timedelta(milliseconds=300)


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
    wait_until(lambda: not pools.listed(session), 20, "the lease to end")
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
    wait_until(lambda: set(pools.listed(session)) == {"kept", "leased"}, 20, "two leases to end")
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
