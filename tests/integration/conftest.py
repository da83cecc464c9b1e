"""Fixtures of more than one file of this folder."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config_db.engine import open_engine
from config_db.reader import SnapshotReader
from tasks.client import FarmClient
from tests.config_writes import RARELY_S
from tests.hosts import LivePool, starting_pools
from tests.live import LiveFarm, fake_spec
from tests.lora import make_adapted
from tests.rerankers import make_causal_rerankers, make_cross_encoders
from tests.services import PostgresServer, RedisServer
from tests.standin import StandIn
from tests.token_lora import make_token_adapters
from tests.web import Web, start_web, stop_web

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Connections to the test's own config DB."""
    made = open_engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """One transaction for the whole test."""
    with Session(engine) as opened:
        yield opened


@pytest.fixture
def reader(database_url: str) -> Iterator[SnapshotReader]:
    """Not started; looks only when told to."""
    made = SnapshotReader(database_url, poll_s=RARELY_S, copy_path=None)
    yield made
    made.stop()


@pytest.fixture
def client(redis_url: str) -> Iterator[FarmClient]:
    """What the web puts requests into the queues with; a thousand may wait."""
    made = FarmClient(redis_url, queue_limit=1000, result_ttl_s=600)
    yield made
    made.close()


@pytest.fixture
def standin(redis_url: str) -> Iterator[StandIn]:
    """A worker as Redis knows one; it serves once it is started."""
    made = StandIn(redis_url).tell()
    yield made
    made.stop()
    made.redis.close()


@pytest.fixture(scope="module")
def web(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """The API alone, with one model; whoever serves is the test's."""
    made = start_web(redis_server.url, tmp_path_factory.mktemp("web"))
    yield made
    stop_web(made)


@pytest.fixture
def live(redis_url: str, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    """A farm that serves one fake model, still without workers."""
    farm = LiveFarm(redis_url, database_url, tmp_path)
    farm.add_models(fake_spec())
    yield farm
    farm.close()


@pytest.fixture(scope="module")
def config_web(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Web]:
    """An API on a config DB without models, for the tests of one file."""
    web = start_web(
        redis_server.url,
        tmp_path_factory.mktemp("configs"),
        (),
        DATABASE_URL=postgres_server.fresh_database(),
        EXTRA_FAMILIES="fake=tests.fakes.family:FakeFamily",
        MODEL_DIRS="/models:/more",
    )
    yield web
    stop_web(web)


@pytest.fixture
def start_pool(tmp_path: Path) -> Iterator[Callable[..., LivePool]]:
    """Starts pools of hosts, configured by the arguments where the defaults of ``tests.hosts`` are not wanted."""
    with starting_pools(tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bases with adapters beside them, and what peft says of them (``tests.lora``)."""
    return make_adapted(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="session")
def token_adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of ``tests.token_models`` with adapters, and what peft says of them (``tests.token_lora``)."""
    return make_token_adapters(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of tiny extractors, and what their libraries say (``tests.tiny_extractors``)."""
    out = tmp_path_factory.mktemp("extractors")
    command = [sys.executable, "-W", "ignore", "-m", "tests.tiny_extractors", str(out)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return out


@pytest.fixture(scope="session")
def cross_encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny cross-encoders with what their library says of them; see ``tests.rerankers``."""
    directory = tmp_path_factory.mktemp("cross-encoders")
    make_cross_encoders(directory)
    return directory


@pytest.fixture(scope="session")
def causal_rerankers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny causal rerankers with what their library says of them; see ``tests.rerankers``."""
    directory = tmp_path_factory.mktemp("causal-rerankers")
    make_causal_rerankers(directory)
    return directory
