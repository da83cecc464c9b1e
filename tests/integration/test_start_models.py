"""The models a farm starts with, and what operators made of them since."""

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from cli import catalogue
from config_db.engine import open_engine
from config_db.publish import Delete, Put, live, publish
from config_db.spec import ModelSpec, Source


def spec(name: str, *, max_length: int = 8) -> ModelSpec:
    return ModelSpec(id=name, family="dense", source=Source(path=str(Path("/models"))), max_length=max_length)


@pytest.fixture
def by_hand(database_url: str) -> None:
    """``changed`` was given another length by an operator, ``deleted`` was deleted, ``own`` is the farm's own."""
    catalogue.offer(database_url, [spec(name) for name in ("own", "changed", "deleted")], reason="start")
    engine = open_engine(database_url)
    with Session(engine) as session, session.begin():
        wanted = {**live(session, "model")["changed"], "max_length": 99}
        publish(session, [Put("model", "changed", wanted), Delete("model", "deleted")], actor="ann", reason="by hand")
    engine.dispose()


@pytest.mark.usefixtures("by_hand")
def test_a_restart_brings_back_nothing_that_somebody_has_changed(database_url: str) -> None:
    newer = [spec(name, max_length=16) for name in ("own", "changed", "deleted", "new")]
    catalogue.offer(database_url, newer, reason="start")
    lengths = {one.id: one.max_length for one in catalogue.published(database_url)}
    assert lengths == {"own": 16, "changed": 99, "new": 16}


@pytest.mark.usefixtures("by_hand")
def test_a_restart_that_offers_nothing_new_is_no_epoch(database_url: str) -> None:
    first = catalogue.offer(database_url, [spec("own")], reason="start")
    assert catalogue.offer(database_url, [spec("own"), spec("changed"), spec("deleted")], reason="start") == first
