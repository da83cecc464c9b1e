"""The children of a farm on one machine: what each is, what it needs, and the environment they share."""

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cli import data_dir, heartbeats
from cli.data_dir import DataDir
from cli.demo import demo_directory
from cli.servers import DATABASE, PostgresServer, RedisServer
from cli.supervisor import Stage, Unit
from common.errors import SetupError
from common.settings import WorkerSettings

SERVER_TRIES: Final = 2
WORKER_TRIES: Final = 3
OWN_DATABASE_WAIT_S: Final = 60.0
FOREIGN_DATABASE_WAIT_S: Final = 5.0
EXTRAS: Final[dict[str, tuple[str, ...]]] = {
    "web": ("flask", "gunicorn", "gevent"),
    "worker": ("torch", "transformers", "tokenizers", "safetensors"),
}
_HERE: Final = Path(__file__).resolve().parent.parent
FLOWER_CONFIG: Final = _HERE / "cli" / "flowerconfig.py"


@dataclass(frozen=True)
class FarmOptions:
    """What ``farmhand up`` was asked for. ``hosts`` is None for as many as fit the machine."""

    host: str = "127.0.0.1"
    port: int = 8080
    flower_port: int = 5555
    has_flower: bool = True
    machine_profile: str = "cpu"
    workers: int = 1
    hosts: int | None = None
    model_dirs: tuple[Path, ...] = ()
    has_demo: bool = True
    catalog: Path | None = _HERE / "catalog"

    @property
    def url(self) -> str:
        """Where the API is found from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def flower_url(self) -> str:
        """Where Flower is found, from this machine only."""
        return f"http://127.0.0.1:{self.flower_port}"


class FarmPlan:
    """Decides what runs and where, and lays out the files of the farm's own servers; starts nothing.

    Args:
        options: what was asked for.
        data: the farm's directory, taken.
        settings: of the environment; a server that it names is used instead of one of the farm's own.
    """

    def __init__(self, options: FarmOptions, data: DataDir, settings: WorkerSettings) -> None:
        self.options = options
        self._data = data
        self._settings = settings
        given = settings.model_fields_set
        self.redis = None if "redis_url" in given else RedisServer(data.path / "redis", data.port("redis"))
        self.postgres = (
            None if "database_url" in given else PostgresServer(data.path / "postgres", data.port("postgres"))
        )
        self.redis_url = self.redis.url if self.redis else settings.redis_url
        self.database_url = self.postgres.url() if self.postgres else settings.database_url
        self._environment = self._make_environment()

    def units(self) -> list[Unit]:
        """Every child until the farm answers, in order of their start."""
        serving = ("redis", "postgres") if self._is_schema_known() else ("redis", "schema")
        return [
            *self._redis_units(),
            *self._postgres_units(),
            self._schema_unit(),
            *(self._worker_unit(number, serving) for number in range(1, self.options.workers + 1)),
            self._web_unit(serving),
        ]

    def step(self, name: str, doing: str, needs: tuple[str, ...], *argument: Callable[[], str]) -> Unit:
        """One of ``cli.first_request``'s steps; it may fail without ending the farm."""
        return Unit(
            name=name,
            doing=doing,
            command=lambda: [
                *(sys.executable, "-m", "cli.first_request", name, self.options.url),
                *(one() for one in argument),
            ],
            environment=self._environment,
            needs=needs,
            once=True,
            is_vital=False,
        )

    def flower_unit(self) -> Unit:
        """Flower, on this machine only: it lets anybody who reaches it control the workers."""
        port = self.options.flower_port
        return Unit(
            name="flower",
            doing="Flower",
            command=lambda: [
                *(sys.executable, "-m", "celery", "flower", "--address=127.0.0.1", f"--port={port}"),
                f"--conf={FLOWER_CONFIG}",
            ],
            environment=self._environment
            | {"BROKER_URL": self.redis_url},  # not among the arguments: it holds a password
            is_ready=lambda _: data_dir.why_not_free("127.0.0.1", port) is not None,
            is_vital=False,
        )

    def _redis_units(self) -> list[Unit]:
        server = self.redis
        if server is None:
            return []
        server.prepare()
        return [
            Unit(
                name="redis",
                doing="Redis",
                command=server.command,
                environment=self._environment,
                is_ready=lambda _: server.is_ready(),
                on_ready=lambda: heartbeats.forget(server.url),
                tries=SERVER_TRIES,
                stage=Stage.STORING,
            )
        ]

    def _postgres_units(self) -> list[Unit]:
        server = self.postgres
        if server is None:
            return []
        making = []
        if server.has_data:
            server.forget_killed()
        else:
            making = [
                Unit(
                    name="postgres-data",
                    doing="PostgreSQL's data (first start)",
                    command=server.making_data,
                    environment=self._environment,
                    once=True,
                    on_ready=server.adopt_data,
                )
            ]
        running = Unit(
            name="postgres",
            doing="PostgreSQL",
            command=server.command,
            environment=self._environment,
            needs=tuple(unit.name for unit in making),
            is_ready=server.is_started,
            tries=SERVER_TRIES,
            stage=Stage.STORING,
            stop_signal=signal.SIGINT,  # its fast shutdown: it does not wait for clients
        )
        return [*making, running]

    def _schema_unit(self) -> Unit:
        options, is_own = self.options, self.postgres is not None
        wait_s = OWN_DATABASE_WAIT_S if is_own else FOREIGN_DATABASE_WAIT_S
        command = [sys.executable, "-m", "cli.prepare", "--wait-s", str(wait_s)]
        command += ["--create"] if is_own else []
        command += [] if self.redis else ["--ask-redis"]
        command += ["--demo"] if options.has_demo else []
        command += ["--catalog", str(options.catalog)] if options.catalog is not None else []
        command += [word for directory in options.model_dirs for word in ("--model-dir", str(directory))]
        return Unit(
            name="schema",
            doing="schema and catalogue",
            command=lambda: command,
            environment=self._environment,
            once=True,
            on_ready=self._remember_schema,
        )

    def _worker_unit(self, number: int, needs: tuple[str, ...]) -> Unit:
        name = f"worker-{number}"
        return Unit(
            name=name,
            doing=name,
            command=lambda: [
                *(sys.executable, "-m", "celery", "-A", "workers.app", "worker"),
                *("-n", f"{name}@%h", "--loglevel", "WARNING"),
            ],
            environment=self._environment
            | {"FARMHAND_WORKERS_HERE": str(self.options.workers), "FARMHAND_WORKER_NUMBER": str(number)},
            needs=self._own(needs),
            on_death=lambda pid: heartbeats.forget(self.redis_url, pid=pid),
            tries=WORKER_TRIES,
            is_worker=True,
        )

    def _web_unit(self, needs: tuple[str, ...]) -> Unit:
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return Unit(
            name="web",
            doing="the API",
            command=lambda: [
                *(sys.executable, "-m", "gunicorn", "-c", "python:webapp.gunicorn_conf"),
                *("--bind", f"{host}:{self.options.port}"),
            ],
            environment=self._environment,
            needs=self._own(needs),
            tries=WORKER_TRIES,
            hurry=signal.SIGQUIT,
        )

    def _own(self, needs: tuple[str, ...]) -> tuple[str, ...]:
        """Without the servers that are not the farm's own."""
        absent = {name for name, server in (("redis", self.redis), ("postgres", self.postgres)) if server is None}
        return tuple(need for need in needs if need not in absent)

    def _make_environment(self) -> dict[str, str]:
        """What every child gets: the operator's own environment, and where this farm is."""
        options = self.options
        roots = [str(directory.resolve()) for directory in options.model_dirs]
        if options.has_demo:
            roots.append(str(demo_directory().resolve()))
        roots += self._settings.model_roots
        environment = dict(os.environ) | {  # noqa: TID251 - children inherit it
            "FARMHAND_REDIS_URL": self.redis_url,
            "FARMHAND_DATABASE_URL": self.database_url,
            "FARMHAND_STATE_DIR": str(self._data.path / "state"),
            "FARMHAND_MACHINE_PROFILE": options.machine_profile,
            "FARMHAND_MODEL_DIRS": ":".join(dict.fromkeys(roots)),
        }
        if options.hosts is not None:
            environment["FARMHAND_HOSTS"] = str(options.hosts)
        return environment

    def _is_schema_known(self) -> bool:
        """Whether the farm's own database had this schema when the last farm ran: then nobody waits for migrations."""
        return self.postgres is not None and self._schema_file.exists() and self._schema_file.read_text() == _schema()

    def _remember_schema(self) -> None:
        self._schema_file.write_text(_schema())

    @property
    def _schema_file(self) -> Path:
        return self._data.path / "run" / "schema"


def check_ports_differ(options: FarmOptions) -> None:
    """SetupError if the API and Flower were given the same port."""
    if options.has_flower and options.port == options.flower_port:
        raise SetupError(f"port {options.port} is wanted by the API and by Flower: change --port or --flower-port")


def check_installed(*, flower: bool) -> None:
    """SetupError naming the extra that is missing, if one is."""
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            raise SetupError(f"{', '.join(missing)} is not installed: install farmhand with the extra {extra!r}")
    if flower and find_spec("flower") is None:
        raise SetupError("flower is not installed: install farmhand with the extra 'cli', or start with --no-flower")


def _schema() -> str:
    """A digest of the migrations there are."""
    spec = find_spec("migrations")
    digest = hashlib.sha256(DATABASE.encode())
    for root in (spec.submodule_search_locations or []) if spec else []:
        for script in sorted(Path(root).glob("versions/*.py")):
            digest.update(script.name.encode() + script.read_bytes())
    return digest.hexdigest()
