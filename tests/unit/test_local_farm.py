"""Which servers a command means when nobody names them."""

import json
from pathlib import Path

import pytest
import typer

from cli import local_farm
from cli.config import DataDir
from cli.servers import DATABASE
from common.errors import SetupError

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
    (tmp_path / "lock").write_text("")
    return tmp_path


def given(data_dir: Path | None) -> Path:
    """The data directory that a command gets that was given one, or none."""
    command = typer.Typer()
    got = []

    @command.command()
    def note(data_dir: DataDir = local_farm.DATA_DIR) -> None:
        got.append(data_dir)

    command([] if data_dir is None else ["--data-dir", str(data_dir)], standalone_mode=False)
    return got[0]


def test_a_directory_that_is_named_has_a_farm_in_it(farm: Path) -> None:
    assert given(farm) == farm
    assert given(None) == local_farm.DATA_DIR
    with pytest.raises(SetupError, match=r"there is no farm in .*/none"):
        given(farm / "none")
    with pytest.raises(SetupError, match=r"there is no farm in .*/redis"):
        given(farm / "redis")


@pytest.mark.parametrize("left", ["", "{", "[]", '{"postgres": 5433}'])
def test_a_named_farm_whose_ports_are_lost_is_no_default_server(farm: Path, left: str) -> None:
    (farm / "ports.json").write_text(left)
    with pytest.raises(SetupError, match="start the farm there once"):
        given(farm)


def test_a_named_farm_on_foreign_servers_needs_no_ports(farm: Path) -> None:
    for server in ("postgres", "redis"):
        (farm / server / "password").unlink()
    (farm / "ports.json").unlink()
    assert given(farm) == farm


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
