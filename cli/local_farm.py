"""Which servers a command means: those that the environment names, else those of the farm on this machine."""

import json
from pathlib import Path
from typing import Any, Final

import typer

from cli.servers import PostgresServer, RedisServer
from common.errors import SetupError
from common.settings import CommonSettings, load_settings

DATA_DIR: Final = Path(".farmhand")
_SERVERS: Final = ("postgres", "redis")


def check_given(context: typer.Context, parameter: typer.CallbackParam, data_dir: Path) -> Path:
    """Refuse a directory that somebody has named and no farm is in: the default server may be quite another's.

    Raises:
        SetupError: there is no farm, or it does not say where its own servers listen.
    """
    source = context.get_parameter_source(str(parameter.name))
    if source is None or source.name != "COMMANDLINE":
        return data_dir
    if not (data_dir / "lock").is_file():
        raise SetupError(f"there is no farm in {data_dir}: --data-dir names the directory that `farmhand up` was given")
    for server in _SERVERS:
        if _has_own(data_dir, server) and _port(data_dir, server) is None:
            raise SetupError(
                f"{data_dir / 'ports.json'} does not say where {server} listens: start the farm there once"
            )
    return data_dir


def database_url(data_dir: Path = DATA_DIR) -> str:
    """The config DB: of ``FARMHAND_DATABASE_URL``, else of the farm of ``data_dir``, else where it is by default."""
    settings = load_settings(CommonSettings)
    port = _port(data_dir, "postgres")
    if "database_url" in settings.model_fields_set or port is None:
        return settings.database_url
    return PostgresServer(data_dir / "postgres", port).url()


def redis_url(data_dir: Path = DATA_DIR) -> str:
    """The farm's Redis, found as ``database_url`` is."""
    settings = load_settings(CommonSettings)
    port = _port(data_dir, "redis")
    if "redis_url" in settings.model_fields_set or port is None:
        return settings.redis_url
    return RedisServer(data_dir / "redis", port).url


def _port(data_dir: Path, server: str) -> int | None:
    """Where a farm's own server listens; None if the farm has none of its own, or there is no farm."""
    if not _has_own(data_dir, server):
        return None
    try:
        ports: Any = json.loads((data_dir / "ports.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    port = ports.get(server) if isinstance(ports, dict) else None
    return port if isinstance(port, int) else None


def _has_own(data_dir: Path, server: str) -> bool:
    return (data_dir / server / "password").exists()
