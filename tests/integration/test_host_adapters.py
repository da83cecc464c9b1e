"""Adapters on real hosts: shared micro-batches, a small budget, bases that leave, and whose adapter is whose."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.torch import load_file

from config_db.adapters import adapter_digest
from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec, Source
from tasks.messages import encode_body
from tasks.names import Operation
from tests.hosts import LONG_S, LivePool, code, starting_pools, vector
from tests.integration.test_dense import cosines
from tests.lora import MANY, NAMES, TEXTS, asking, reference, source
from workers.host.adapters import SHARE
from workers.hosts.protocol import HostBatch, PartResult

Part = tuple[str, Source | None]


def spec_of(folder: Path, name: str = "org/base", **changes: Any) -> ModelSpec:
    return msgspec.structs.replace(spec_of_directory(folder), id=name, precision="float32", **changes)


def send(live: LivePool, host: int, spec: ModelSpec, parts: Sequence[Part], digests: Sequence[str | None] = ()) -> int:
    """One micro-batch of single texts, each with its adapter's source or none."""
    live.last_batch += 1
    bodies = tuple(encode_body(spec.id, asking(text, where)) for text, where in parts)
    names = tuple(digests) or tuple(where and adapter_digest(where) for _, where in parts)
    live.pool.send(
        host, HostBatch(live.last_batch, spec, Operation.ENCODE, names if any(names) else None, bodies, LONG_S)
    )
    return live.last_batch


def run(live: LivePool, host: int, spec: ModelSpec, parts: Sequence[Part], **rest: Any) -> list[PartResult]:
    batch = send(live, host, spec, parts, **rest)
    live.until(lambda: batch in live.events.done, "results")
    return live.events.done[batch][0]


def vectors(results: Sequence[PartResult]) -> np.ndarray[Any, Any]:
    return np.stack([vector(one) for one in results])


def weights(folder: Path, name: str) -> int:
    """Bytes of the tensors of a file."""
    return sum(one.numel() * one.element_size() for one in load_file(folder / f"{name}.safetensors").values())


def news(live: LivePool, event: str) -> list[dict[str, Any]]:
    return [detail for _, _, said, detail in live.events.models if said == event]


@pytest.fixture(scope="module")
def base(adapted: dict[str, Path]) -> Path:
    return adapted["bert"]


@pytest.fixture(scope="module")
def expected(base: Path) -> dict[str | None, np.ndarray[Any, Any]]:
    return {None: np.load(base.parent / "st.npy")} | {name: reference(base, name) for name in (*NAMES, *MANY)}


@pytest.fixture(scope="module")
def starting(base: Path) -> Iterator[Callable[..., LivePool]]:
    with starting_pools(base.parent.parent) as start:
        yield lambda **config: start(**{"device_memory": 2**30, **config})


@pytest.fixture(scope="module")
def live(starting: Callable[..., LivePool]) -> LivePool:
    """One host with room for everything."""
    return starting()


def test_requests_for_many_adapters_and_none_share_a_micro_batch(
    live: LivePool, base: Path, expected: dict[str | None, Any]
) -> None:
    host, spec = live.ready()[0].id, spec_of(base)
    plain = vectors(run(live, host, spec, [(text, None) for text in TEXTS]))
    wanted = [(at, name) for at in range(len(TEXTS)) for name in (None, *NAMES)]
    random.Random(1).shuffle(wanted)
    found = vectors(run(live, host, spec, [(TEXTS[at], name and source(base, name)) for at, name in wanted]))
    right = np.stack([expected[name][at] for at, name in wanted])
    assert cosines(found, right).min() >= 0.9999
    assert np.array_equal(plain, vectors(run(live, host, spec, [(text, None) for text in TEXTS])))
    told = news(live, "adapter_loaded")
    assert {one["adapter"] for one in told} == {adapter_digest(source(base, name)) for name in NAMES}
    sizes = {view.id: view.resident[spec.digest] for view in live.pool.hosts()}
    assert all(one["bytes"] > 0 and len(one["files"]) == 16 for one in told), sizes


def test_an_adapter_is_known_by_where_it_comes_from(
    live: LivePool, base: Path, expected: dict[str | None, Any]
) -> None:
    """Two folders of one name; and a request that was routed as another's."""
    host, spec = live.ready()[0].id, spec_of(base)
    one, other = source(base, "wide"), source(base, "small")
    found = vectors(run(live, host, spec, [(TEXTS[1], one), (TEXTS[1], other)]))
    assert cosines(found, np.stack([expected["wide"][1], expected["small"][1]])).min() >= 0.9999
    wrong = run(
        live,
        host,
        spec,
        [("a", one), ("b", other), ("c", None), ("d", one)],
        digests=[adapter_digest(other), adapter_digest(other), adapter_digest(one), None],
    )
    assert [code(part) for part in wrong] == ["INVALID_INPUT", None, "INVALID_INPUT", "INVALID_INPUT"]
    assert wrong[0].error is not None
    assert wrong[0].error["param"] == "params.options.lora"


def test_a_broken_adapter_fails_its_own_requests_only(live: LivePool, base: Path, tmp_path: Path) -> None:
    host, spec = live.ready()[0].id, spec_of(base)
    nowhere = Source(path=str(base.parent / "nowhere"))
    outside = Source(path=str(tmp_path))
    parts = [("a", None), ("b", nowhere), ("c", source(base, "wide")), ("d", outside)]
    for _ in range(2):  # the second time from memory
        results = run(live, host, spec, parts)
        assert [code(part) for part in results] == [None, "MODEL_LOAD_FAILED", None, "MODEL_LOAD_FAILED"]
        assert [part.error["error_class"] for part in results if part.error] == ["NOT_FOUND", "CONFIG"]
        assert str(nowhere) in (results[1].error or {})["message"]
    assert len(news(live, "adapter_failed")) == 2


def test_a_model_that_takes_no_adapters_says_so(live: LivePool, base: Path) -> None:
    host, spec = live.ready()[0].id, live.spec()
    (part,) = run(live, host, spec, [("a", source(base, "wide"))])
    assert code(part) == "INVALID_INPUT"
    assert "takes no adapters" in (part.error or {})["message"]


def test_an_evicted_base_takes_its_adapters_along_and_they_come_back(
    starting: Callable[..., LivePool], base: Path, adapted: dict[str, Path], expected: dict[str | None, Any]
) -> None:
    """Room for one of the two bases at a time, taken in turns."""
    bases = [spec_of(base, "org/one"), spec_of(adapted["modernbert"], "org/two")]
    largest = max(weights(folder, "model") for folder in (base, adapted["modernbert"]))
    live = starting(device_memory=largest * 3 // 2)
    host = live.ready()[0].id
    other = reference(adapted["modernbert"], "small")
    for turn in range(3):
        found = vectors(run(live, host, bases[0], [(TEXTS[1], source(base, "small")), (TEXTS[1], None)]))
        assert cosines(found, np.stack([expected["small"][1], expected[None][1]])).min() >= 0.9999
        found = vectors(run(live, host, bases[1], [(TEXTS[1], source(adapted["modernbert"], "small"))]))
        assert cosines(found, other[1:2]).min() >= 0.9999
        assert len(news(live, "adapter_loaded")) == 2 * (turn + 1)
        assert len(live.pool.hosts()[0].resident) == 1


def test_a_base_that_fills_the_device_runs_its_adapters_in_turns(
    starting: Callable[..., LivePool], base: Path, expected: dict[str | None, Any]
) -> None:
    """Beside the base there is room for two of them, though adapters might hold more."""
    size = weights(base.parent / MANY[0], "adapter_model")
    live = starting()
    host, spec = live.ready()[0].id, spec_of(base)
    run(live, host, spec, [("a", None)])
    held = live.pool.hosts()[0].resident[spec.digest]
    assert (held + 2.5 * size) * SHARE > 2.5 * size
    live = starting(device_memory=int(held + 2.5 * size))
    host = live.ready()[0].id
    found = vectors(run(live, host, spec, [(TEXTS[1], source(base, name)) for name in MANY]))
    assert cosines(found, np.stack([expected[name][1] for name in MANY])).min() >= 0.9999
    assert len(news(live, "adapter_evicted")) == len(MANY) - 2


def test_a_storm_of_adapters_over_a_small_budget(
    starting: Callable[..., LivePool], base: Path, expected: dict[str | None, Any]
) -> None:
    """Room for three of eight; micro-batches that want all eight at once, several on their way."""
    spec = spec_of(base)
    live = starting(device_memory=int(3.5 * weights(base.parent / MANY[0], "adapter_model") / SHARE))
    host = live.ready()[0].id
    dice = random.Random(2)
    for _ in range(4):
        wanted = [[(dice.randrange(len(TEXTS)), name) for name in (None, *MANY, *MANY)] for _ in range(3)]
        for one in wanted:
            dice.shuffle(one)
        sent = [
            send(live, host, spec, [(TEXTS[at], name and source(base, name)) for at, name in one]) for one in wanted
        ]
        live.until(lambda sent=sent: set(sent) <= live.events.done.keys(), "all results")
        for batch, one in zip(sent, wanted, strict=True):
            found = vectors(live.events.done[batch][0])
            assert cosines(found, np.stack([expected[name][at] for at, name in one])).min() >= 0.9999
    loaded, evicted = len(news(live, "adapter_loaded")), len(news(live, "adapter_evicted"))
    assert loaded >= 8 * 4
    assert loaded - evicted <= 3
    assert live.events.lost == []
