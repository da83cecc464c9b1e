"""One model of every family resident in one host: what befalls one of them is no other's affair.

One worker serves all tests of this file; each proves the state that it strikes at.
"""

import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from config_db.spec import ModelSpec
from tasks import codec
from tasks.messages import Outcome
from tests import every_family
from tests.live import LiveFarm, LiveWorker, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until

POISON = "fake/poison"
SLOW = "fake/slow"
FAMILIES = tuple(every_family.REQUESTS)
MIB = 2**20


class Everything:
    """A farm of one worker with all families, and what each answered first."""

    def __init__(self, farm: LiveFarm, models: Mapping[str, ModelSpec]) -> None:
        self.farm = farm
        self.models = models
        self.worker: LiveWorker = farm.start_worker(device_memory="2GiB")
        farm.wait_outcomes([farm.send("x", model=POISON)])
        self.first = {name: self.answer(outcome) for name, outcome in self.outcomes(self.ask()).items()}

    def ask(self, **models: str) -> dict[str, str]:
        """Send each family's request; ``models`` are sent in place of theirs. Task ids by family."""
        sent = {}
        for name, (operation, request) in every_family.REQUESTS.items():
            model = models.get(name, self.models[name].id)
            sent[name] = self.farm.send(model=model, operation=operation, request=request)
        return sent

    def outcomes(self, sent: Mapping[str, str]) -> dict[str, Outcome]:
        return dict(zip(sent, self.farm.wait_outcomes(list(sent.values()), timeout_s=60), strict=True))

    def answer(self, outcome: Outcome) -> Any:
        assert outcome.error is None, (outcome.model, outcome.error)
        return codec.unpack(bytes(outcome.result))

    def assert_as_first(self, sent: Mapping[str, str]) -> None:
        """Every family answers as it did at first, to rounding: batch-mates differ."""
        for name, outcome in self.outcomes(sent).items():
            assert_same(self.answer(outcome), self.first[name], name)

    def host(self) -> psutil.Process:
        (pid,) = self.worker.host_pids()
        return psutil.Process(pid)


def assert_same(found: Any, wanted: Any, where: str) -> None:
    """The same content, numbers but for rounding."""
    if isinstance(wanted, dict) and "data" in wanted and isinstance(wanted.get("data"), bytes):
        np.testing.assert_allclose(codec.array_of(found), codec.array_of(wanted), atol=1e-2, err_msg=where)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for name, value in wanted.items():
            assert_same(found[name], value, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for at, value in enumerate(wanted):
            assert_same(found[at], value, f"{where}[{at}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-2), where
    else:
        assert found == wanted, where


@pytest.fixture(scope="module")
def everything(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Everything]:
    directory = tmp_path_factory.mktemp("every-family")
    every_family.make(directory)
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    models = every_family.specs(directory)
    farm.add_models(*models.values(), fake_spec(POISON), fake_spec(SLOW, item_ms=1500))
    try:
        yield Everything(farm, models)
    finally:
        farm.close()


def test_every_family_is_resident_at_once(everything: Everything) -> None:
    assert set(everything.first) == set(FAMILIES)
    everything.assert_as_first(everything.ask())
    log = everything.worker.log.read_text()
    assert len(re.findall(r"change\W+loaded", log)) == len(FAMILIES) + 1
    assert not re.findall(r"change\W+evicted", log)


def test_a_poisonous_item_fails_alone(everything: Everything) -> None:
    """Items that cannot be read, one that raises, one that takes the host with it."""
    farm, before = everything.farm, everything.host().pid
    good = [everything.ask()]
    bad = []
    for name, (operation, request) in every_family.REQUESTS.items():
        spoilt = msgspec.structs.replace(request, items=[{"id": "a", "text": 5}])
        bad.append(farm.send(model=everything.models[name].id, operation=operation, request=spoilt))
    bad += [farm.send(text, model=POISON) for text in ("!raise", "!segfault")]
    good.append(everything.ask())
    for sent in good:
        everything.assert_as_first(sent)
    outcomes = farm.wait_outcomes(bad, timeout_s=60)
    assert [is_refused(outcome) for outcome in outcomes] == [True] * len(bad)
    assert everything.host().pid != before
    farm.assert_settled()


def is_refused(outcome: Outcome) -> bool:
    """Whether it is an error, of the request or, as extractors answer, of its one item."""
    return outcome.error is not None or "error" in codec.unpack(bytes(outcome.result))[0]


def test_a_model_whose_files_are_broken_hurts_no_other(everything: Everything, tmp_path: Path) -> None:
    """Weights cut off in the middle, for each family, loaded beside the requests of the others."""
    broken = {name: cut_off(spec, tmp_path / name) for name, spec in everything.models.items()}
    everything.farm.add_models(*broken.values())
    pid = everything.host().pid
    failing = everything.ask(**{name: spec.id for name, spec in broken.items()})
    everything.assert_as_first(everything.ask())
    for name, outcome in everything.outcomes(failing).items():
        assert outcome.error is not None, name
        assert outcome.error["code"] == "MODEL_LOAD_FAILED", (name, outcome.error)
    everything.assert_as_first(everything.ask())
    assert everything.host().pid == pid


def cut_off(spec: ModelSpec, folder: Path) -> ModelSpec:
    """A model of the same files, of whose weights a part is missing."""
    folder.mkdir()
    place = Path(str(spec.source.path))
    for path in place.rglob("*"):
        there = folder / path.relative_to(place)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        elif path.suffix == ".safetensors":
            there.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            there.write_bytes(path.read_bytes())
    source = msgspec.structs.replace(spec.source, path=str(folder))
    return msgspec.structs.replace(spec, id=f"broken/{spec.family}", source=source)


def test_a_killed_host_costs_no_family_a_request(everything: Everything) -> None:
    farm = everything.farm
    running = farm.send("x", model=SLOW)
    wait_until(lambda: everything.worker.started() > 0, 20, "the slow request to run")
    sent: Sequence[dict[str, str]] = [everything.ask() for _ in range(3)]
    victim = everything.host().pid
    os.kill(victim, signal.SIGKILL)
    for one in sent:
        everything.assert_as_first(one)
    (outcome,) = farm.wait_outcomes([running], timeout_s=60)
    assert outcome.error is None
    assert everything.host().pid != victim
    farm.assert_settled()


def test_memory_falls_at_eviction_and_every_family_answers_as_before_when_it_is_back(everything: Everything) -> None:
    everything.assert_as_first(everything.ask())
    full = resident_bytes(everything.host())
    held = sum(weights_of(spec) for spec in everything.models.values() if spec.family in every_family.LARGE)
    assert held > 100 * MIB
    everything.farm.replace_models(fake_spec(POISON), fake_spec(SLOW, item_ms=1500))
    gone = 0.85 * held
    wait_until(lambda: full - resident_bytes(everything.host()) > gone, 20, f"{gone} of {full} bytes to be given back")
    everything.farm.add_models(*everything.models.values())
    everything.assert_as_first(everything.ask())


def resident_bytes(process: psutil.Process) -> int:
    """Its pages, those of mapped weights included; not its share of them, which changes with every other host."""
    return int(process.memory_info().rss)


def weights_of(spec: ModelSpec) -> int:
    """Bytes in half precision."""
    return sum(path.stat().st_size for path in Path(str(spec.source.path)).rglob("*.safetensors")) // 2
