"""What files say and what the config DB then says, on a real PostgreSQL."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from cli import export_folder
from common.errors import ConfigError, EpochConflictError, SetupError
from config_db import pools, tenants
from config_db.access import PoolSpec, TenantSpec
from config_db.catalog import apply_models
from config_db.config_files import ConfigFiles, read_files
from config_db.engine import open_engine
from config_db.epochs import epoch_now
from config_db.publish import Change, Put, live, publish
from config_db.reconcile import apply_files, plan_files
from config_db.schema import Kind
from config_db.spec import ModelSpec
from tests.services import PostgresServer
from tests.specs import catalogues

MODEL = "family: dense\nsource: {hub: a/b}\n"
WHO: dict[str, Any] = {"actor": "ann", "reason": "test"}


def files(directory: Path, **contents: str) -> ConfigFiles:
    """What these files say, and no others."""
    for path in directory.glob("*.yaml"):
        path.unlink()
    for name, content in contents.items():
        (directory / f"{name}.yaml").write_text(content)
    found = read_files(directory)
    assert found.faults == []
    return found


def apply(
    engine: Engine, found: ConfigFiles, *, prune: bool = False, expected: int | None = None
) -> tuple[Change, ...]:
    """Apply, having planned the very same."""
    with Session(engine) as session:
        planned = plan_files(session, found, prune=prune)
    with Session(engine) as session, session.begin():
        changes = apply_files(session, found, prune=prune, expected=expected, **WHO).changes
    assert planned == changes
    return changes


def names(engine: Engine, kind: Kind) -> set[str]:
    with Session(engine) as session:
        return set(live(session, kind))


def epoch(engine: Engine) -> int:
    with Session(engine) as session:
        return epoch_now(session)[0]


def exported(engine: Engine, directory: Path) -> dict[str, bytes]:
    """The bytes of an export into a directory that holds nothing else."""
    replaced = export_folder.check_free(directory, force=True, families=())
    with Session(engine) as session:
        export_folder.write(directory, export_folder.render(session), replaced=replaced)
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(catalogues)
def test_export_apply_export_gives_identical_bytes(
    postgres_server: PostgresServer, tmp_path: Path, found: list[ModelSpec]
) -> None:
    """Whatever the models are; the second database has never seen them."""
    first, second = (open_engine(postgres_server.fresh_database()) for _ in range(2))
    with Session(first) as session, session.begin():
        apply_models(session, found, **WHO)
    told = exported(first, tmp_path)
    apply(second, read_files(tmp_path))
    assert exported(second, tmp_path) == told
    assert len(told) == len(found)
    apply(first, read_files(tmp_path))
    assert epoch(first) == (2 if found else 1), "what is exported is what stands there already"
    first.dispose()
    second.dispose()


def test_pools_tenants_and_settings_are_exported_and_keys_are_not(
    engine: Engine, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    with Session(engine) as session, session.begin():
        tenants.put(session, "acme", TenantSpec(weight=2.5, note="größer"), **WHO)
        pools.create(session, "gold", PoolSpec(machine_profiles={"l4": 2, "cpu": 1}, tenant="acme"), **WHO)
        pools.create(session, "leased", PoolSpec(machine_profiles={"cpu": 1}, expires_at=ends), **WHO)
        publish(session, [Put("setting", "of.another", {"patterns": ["b/*", "a/*"], "a": None})], **WHO)
        publish(session, [Put("key", "k1", {"secret_sha256": "0" * 64})], **WHO)
    told = exported(engine, tmp_path)
    assert told == {
        "pools.yaml": b"pools:\n  gold:\n    machine_profiles:\n      cpu: 1\n      l4: 2\n    tenant: acme\n",
        "settings.yaml": b"settings:\n  of.another:\n    a: null\n    patterns: [b/*, a/*]\n",
        "tenants.yaml": "tenants:\n  acme:\n    weight: 2.5\n    note: größer\n".encode(),
    }
    assert apply(engine, read_files(tmp_path)) == (), "not even the instant at which the pool was made"
    second = open_engine(postgres_server.fresh_database())
    apply(second, read_files(tmp_path))
    assert exported(second, tmp_path) == told
    second.dispose()


def test_what_a_newer_release_wrote_is_not_exported_in_part(engine: Engine, tmp_path: Path) -> None:
    content = {"id": "a", "family": "dense", "source": {"hub": "a/b"}, "limits": {"max_sparks": 1}}
    with Session(engine) as session, session.begin():
        publish(session, [Put("model", "a", content)], **WHO)
    with pytest.raises(SetupError, match=r"model a .*limits\.max_sparks"):
        exported(engine, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "content"),
    [("tenant", {"weight": "x"}), ("model", {"id": "odd", "family": "dense", "source": {"hub": "x"}, "dims": 3})],
)
def test_a_row_that_cannot_be_read_is_named_and_nothing_is_exported(
    engine: Engine, tmp_path: Path, kind: Kind, content: dict[str, Any]
) -> None:
    with Session(engine) as session, session.begin():
        publish(session, [Put(kind, "odd", content)], **WHO)
    with pytest.raises(SetupError, match=f"{kind} odd was written in a way"):
        exported(engine, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pruning_takes_only_what_the_files_speak_of(engine: Engine, tmp_path: Path) -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    apply(
        engine,
        files(tmp_path, a=f"id: a\n{MODEL}", t="tenants: {acme: {}}\npools: {gold: {machine_profiles: {cpu: 1}}}"),
    )
    with Session(engine) as session, session.begin():
        pools.create(session, "leased", PoolSpec(machine_profiles={"cpu": 1}, expires_at=ends), **WHO)
    apply(engine, files(tmp_path, b=f"id: b\n{MODEL}"), prune=True)
    assert (names(engine, "model"), names(engine, "tenant")) == ({"b"}, {"acme"})
    apply(engine, files(tmp_path, b=f"id: b\n{MODEL}", t="tenants: {}\npools: {}"), prune=True)
    assert (names(engine, "tenant"), names(engine, "pool")) == (set(), {"leased"})
    apply(engine, files(tmp_path, none="models: []"), prune=True)
    assert names(engine, "model") == set()


def test_pruning_leaves_what_was_registered_from_the_hub(engine: Engine, tmp_path: Path) -> None:
    with Session(engine) as session, session.begin():
        registered = {"id": "org/asked-for", "family": "dense", "source": {"hub": "org/asked-for"}}
        publish(session, [Put("model", "org/asked-for", registered, "auto")], **WHO)
    apply(engine, files(tmp_path, b=f"id: b\n{MODEL}"), prune=True)
    assert names(engine, "model") == {"b", "org/asked-for"}


def test_a_pool_stays_somebodys(engine: Engine, tmp_path: Path) -> None:
    pool = "pools: {gold: {machine_profiles: {cpu: 1}, tenant: acme}}"
    with pytest.raises(ConfigError, match=r"pool gold is of the tenant 'acme'"):
        apply(engine, files(tmp_path, p=pool))
    with pytest.raises(ConfigError), Session(engine) as session, session.begin():
        apply_files(session, files(tmp_path, p=pool), prune=False, **WHO)
    assert epoch(engine) == 1
    apply(engine, files(tmp_path, p=f"{pool}\ntenants: {{acme: }}"))
    with pytest.raises(ConfigError, match="pool gold"):
        apply(engine, files(tmp_path, p=pool, t="tenants: {other: }"), prune=True)
    assert names(engine, "tenant") == {"acme"}


def test_a_name_of_a_model_that_stays_is_refused_before_anything_is_written(engine: Engine, tmp_path: Path) -> None:
    apply(engine, files(tmp_path, a=f"id: a\n{MODEL}aliases: [x]"))
    taken = files(tmp_path, b=f"id: b\n{MODEL}aliases: [x]")
    with pytest.raises(ConfigError, match="alias 'x' is a name of model 'a'"):
        apply(engine, taken)
    apply(engine, taken, prune=True)
    assert names(engine, "model") == {"b"}


def test_the_whole_set_is_one_epoch_or_none(engine: Engine, tmp_path: Path) -> None:
    many = files(
        tmp_path, m="models:\n" + "".join(f"- {{id: m{n}, family: dense, source: {{hub: a/b}}}}\n" for n in range(50))
    )
    with pytest.raises(EpochConflictError):
        apply(engine, many, expected=7)
    assert (epoch(engine), names(engine, "model")) == (1, set())
    assert len(apply(engine, many, expected=1)) == 50
    assert (epoch(engine), apply(engine, many)) == (2, ())
