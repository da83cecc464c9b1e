"""Which servers a command means when nobody names them."""

import json
from pathlib import Path

import pytest

from cli import local_farm
from cli.servers import DATABASE

DEFAULT = "postgresql://127.0.0.1/farmhand"


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a farm with servers of its own leaves in its directory."""
    for name in ("FARMHAND_DATABASE_URL", "FARMHAND_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    for server in ("postgres", "redis"):
        (tmp_path / server).mkdir()
        (tmp_path / server / "password").write_text("secret")
    (tmp_path / "ports.json").write_text(json.dumps({"postgres": 5433, "redis": 6380}))
    return tmp_path


def test_it_is_the_farm_on_this_machine(farm: Path) -> None:
    assert local_farm.database_url(farm) == f"postgresql://postgres:secret@127.0.0.1:5433/{DATABASE}"
    assert local_farm.redis_url(farm) == "redis://:secret@127.0.0.1:6380/0"


def test_what_the_environment_names_comes_first(farm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARMHAND_DATABASE_URL", "postgresql://elsewhere/x")
    assert local_farm.database_url(farm) == "postgresql://elsewhere/x"
    assert local_farm.redis_url(farm).endswith(":6380/0")


@pytest.mark.parametrize("left", ["", "{", "[]", "{}", '{"postgres": "x"}'])
def test_without_a_farm_it_is_where_it_is_by_default(farm: Path, left: str) -> None:
    (farm / "ports.json").write_text(left)
    assert local_farm.database_url(farm) == DEFAULT


def test_a_farm_that_uses_foreign_servers_has_none_of_its_own(farm: Path) -> None:
    (farm / "postgres" / "password").unlink()
    assert local_farm.database_url(farm) == DEFAULT
    assert not (farm / "postgres" / "password").exists()
