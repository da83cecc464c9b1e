"""Which servers a command means: those that the environment names, else those of the farm on this machine."""

import json
from pathlib import Path
from typing import Any, Final

from cli.servers import PostgresServer, RedisServer
from common.settings import CommonSettings, load_settings

DATA_DIR: Final = Path(".farmhand")


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
    if not (data_dir / server / "password").exists():
        return None
    try:
        ports: Any = json.loads((data_dir / "ports.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    port = ports.get(server) if isinstance(ports, dict) else None
    return port if isinstance(port, int) else None
