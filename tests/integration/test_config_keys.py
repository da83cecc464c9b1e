"""API keys in the config DB: what opens, what does not any more, and where no secret stands."""

import hmac
import logging
import re
import traceback
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from common.errors import ConfigError, ConfigUnavailableError, EpochConflictError, NotFoundError
from config_db import keys, tenants
from config_db.access import DEFAULT_TENANT, KeySpec, PoolSpec, TenantSpec
from config_db.engine import open_engine, time_now, transaction
from config_db.schema import Table
from tests.config_writes import WHO, add, content, epoch
from tests.services import PostgresServer, wait_until

POOL = PoolSpec(machine_profiles={"l4": 2, "cpu": 1}, client="ci")
SOON = timedelta(milliseconds=300)


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
    wait_until(lambda: keys.find(session, made.key) is None, 20, "the key to expire")
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
