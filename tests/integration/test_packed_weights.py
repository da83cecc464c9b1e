"""A model that stays gets packed weights, where memory is to spare, and answers as before."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from cli.demo import demo_directory
from config_db.model_folders import spec_of_directory
from tasks import codec
from tests.live import LiveFarm, LiveWorker
from tests.services import wait_until
from workers.host.host import BATCHES_UNTIL_PACKED

MODEL = "org/mini"
TEXTS = ["a farm", "The quick brown fox jumps over the lazy dog.", "word " * 300]


@pytest.fixture
def live(redis_url: str, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    farm = LiveFarm(redis_url, database_url, tmp_path)
    farm.add_models(msgspec.structs.replace(spec_of_directory(demo_directory(), model_id=MODEL), precision="float32"))
    yield farm
    farm.close()


def vectors(farm: LiveFarm) -> npt.NDArray[np.float32]:
    (outcome,) = farm.wait_outcomes([farm.send(*TEXTS, model=MODEL)])
    outcome.raise_error()
    return np.stack([codec.array_of(item["dense"]["values"]) for item in msgspec.msgpack.decode(bytes(outcome.result))])


def settled_in(worker: LiveWorker) -> list[dict[str, Any]]:
    lines = [line for line in worker.log.read_text().splitlines() if '"model_settled_in"' in line]
    return [msgspec.json.decode(line) for line in lines]


def test_a_model_that_stays_is_packed_and_answers_as_before(live: LiveFarm) -> None:
    worker = live.start_worker()
    answers = [vectors(live) for _ in range(BATCHES_UNTIL_PACKED + 4)]
    wait_until(lambda: settled_in(worker), 10, "the model to have settled in")
    (told,) = settled_in(worker)
    assert told["bytes"] > 40_000_000
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-5)


def test_nothing_is_packed_where_no_memory_is_to_spare(live: LiveFarm) -> None:
    worker = live.start_worker(device_memory="110MB")
    for _ in range(BATCHES_UNTIL_PACKED + 4):
        vectors(live)
    assert not settled_in(worker)
