"""Memory of real hosts: what leaves, when, why, and that answers stay right while it does."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

from config_db.spec import ModelSpec, Placement, Source
from tasks.messages import Request, encode_body
from tests.fakes.family import fake_vector
from tests.hosts import LivePool, vector
from workers.host.copies import Copies
from workers.host.families.dense import DenseFamily
from workers.host.families.protocol import Device

TEXT = "a farm of small models"
MIB = 2**20


def _bert(folder: Path, seed: int, *, hidden: int, vocabulary: int = 4000) -> Path:
    """A random BERT of about ``vocabulary * hidden`` numbers as an ordinary Hub folder."""
    import torch

    torch.manual_seed(seed)
    shape = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=hidden,
        max_position_embeddings=64,
    )
    BertModel(shape).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1} | {chr(97 + n): n + 2 for n in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve models of 12 MB each in float32, different weights."""
    root = tmp_path_factory.mktemp("models")
    return [_bert(root / f"m{n}", n, hidden=256, vocabulary=10_000) for n in range(12)]


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("tiny")
    return [_bert(root / f"t{n}", n, hidden=16, vocabulary=200) for n in range(60)]


def _dense(path: Path, **more: Any) -> ModelSpec:
    return ModelSpec(id=f"dense/{path.name}", family="dense", source=Source(path=str(path)), **more)


def _rss(live: LivePool, host: int) -> int:
    return int(live.process(host).memory_info().rss)


def _run(live: LivePool, host: int, spec: ModelSpec) -> Any:
    part = live.run(host, spec, TEXT)[0]
    assert part.error is None, part.error
    return vector(part)


def _mirrors(live: LivePool) -> list[dict[str, Any]]:
    return [told for view in live.pool.hosts() for told in view.evictions]


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[Any]:
    """The vectors as transformers alone computes them, in float32."""
    return [_reference(path) for path in folders]


def _reference(path: Path) -> Any:
    import torch

    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT).ids
    with torch.inference_mode():
        states = BertModel.from_pretrained(path).eval()(torch.tensor([ids])).last_hidden_state
    return states[0].mean(0).numpy()


def _cosine(left: Any, right: Any) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def test_memory_falls_at_eviction_and_every_model_still_answers_as_before(
    start_pool: Callable[..., LivePool], folders: list[Path], expected: list[Any], tmp_path: Path
) -> None:
    """Nine times round twelve models in room for four, from files, from copies, from memory.

    A host's memory moves by up to forty MiB as its allocator pleases; of the 72 models that come and go between the two
    looks, twelve that were kept would be seen.
    """
    live = start_pool(
        model_dirs=(str(folders[0].parent),),
        preimport=("workers.host.families.dense",),
        device_memory=4 * 13 * MIB,
        copies_dir=str(tmp_path / "copies"),
        copies_bytes=1000 * MIB,
    )
    host = live.ready()[0].id
    specs = [_dense(path) for path in folders]
    first = [_run(live, host, spec) for spec in specs]
    assert all(_cosine(mine, theirs) > 0.9999 - 0.0005 for mine, theirs in zip(first, expected, strict=True))
    assert len({tuple(one.round(3)) for one in first}) == len(specs)
    for turn in range(8):
        if turn == 2:  # by then all come from copies
            settled = _rss(live, host)
        for spec, before in zip(specs, first, strict=True):
            assert np.array_equal(_run(live, host, spec), before), f"{spec.id} answers differently after its return"
            assert len(live.pool.hosts()[0].resident) <= 8
    resident = live.pool.hosts()[0].resident
    held = sum(resident.values())
    assert _rss(live, host) < settled + len(specs) * held / len(resident)
    before = _rss(live, host)
    for spec in specs:
        live.pool.evict(spec.digest, "removed")
    live.until(lambda: not live.pool.hosts()[0].resident, "evictions")
    live.until(lambda: before - _rss(live, host) > 0.7 * held, f"{held} bytes given back")
    assert {told["reason"] for told in _mirrors(live)} == {"room", "removed"}


def test_sixty_tiny_models_through_a_small_budget(
    start_pool: Callable[..., LivePool], tiny_folders: list[Path], tmp_path: Path
) -> None:
    live = start_pool(
        model_dirs=(str(tiny_folders[0].parent),),
        preimport=("workers.host.families.dense",),
        device_memory=200_000,
        copies_dir=str(tmp_path / "copies"),
        copies_bytes=100 * MIB,
    )
    host = live.ready()[0].id
    specs = [_dense(path) for path in tiny_folders]
    sizes: set[int] = set()
    first = {}
    for spec in specs:
        first[spec.id] = _run(live, host, spec)
        sizes.add(len(live.pool.hosts()[0].resident))
    assert max(sizes) < 30
    for spec in reversed(specs):
        assert np.array_equal(_run(live, host, spec), first[spec.id])
        assert sum(live.pool.hosts()[0].resident.values()) <= 200_000
    for spec, path in list(zip(specs, tiny_folders, strict=True))[::20]:
        assert _cosine(first[spec.id], _reference(path)) > 0.999


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return _bert(tmp_path / "one", 1, hidden=32, vocabulary=200)


def _loaded(family: DenseFamily, path: Path, copies: Copies) -> Any:
    """A model in bfloat16, when its copy, if it needs one, is written and used."""
    model = family.load(_dense(path, precision="bfloat16"), path, Device(copies=copies))
    for thread in threading.enumerate():
        if thread.name == "copies":
            thread.join(20)
    return model


def _vector(model: Any) -> Any:
    request = Request(items=[{"text": TEXT}])
    return model.run(model.prepare("encode", [request]))[0].numpy()


def _storages(model: Any) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in model._opened.weights().values()})


def test_converted_weights_are_written_once_and_mapped_by_whoever_loads_them(one: Path, tmp_path: Path) -> None:
    copies = Copies(tmp_path / "copies", 100 * MIB)
    first = _loaded(DenseFamily(), one, copies)
    before = _vector(first)
    (path,) = (tmp_path / "copies").iterdir()
    written = path.stat().st_mtime_ns
    assert _storages(first) == 1  # it has exchanged what it converted for what it wrote
    second = _loaded(DenseFamily(), one, copies)
    assert _storages(second) == 1
    assert np.array_equal(_vector(second), before)
    found = copies.find(path.stem)
    assert found is not None
    path.unlink()
    copies.keep(path.stem, {name: 2 * tensor for name, tensor in found.tensors().items()}, found.note)
    assert not np.array_equal(_vector(_loaded(DenseFamily(), one, copies)), before)  # so the copy it was that answered
    assert path.stat().st_mtime_ns != written


def test_a_model_replaced_on_disk_is_not_served_from_its_old_copy(one: Path, tmp_path: Path) -> None:
    copies = Copies(tmp_path / "copies", 100 * MIB)
    family = DenseFamily()
    resident = _loaded(family, one, copies)
    before = _vector(resident)
    _bert(tmp_path / "new", 2, hidden=32, vocabulary=200)
    (tmp_path / "new" / "model.safetensors").replace(one / "model.safetensors")
    assert np.array_equal(_vector(resident), before)  # what is mapped stays as it was
    resident.close()
    after = _vector(_loaded(family, one, copies))
    assert _cosine(after, _reference(one)) > 0.999
    assert _cosine(before, _reference(one)) < 0.999


def test_models_of_one_architecture_share_no_weights(one: Path, tmp_path: Path) -> None:
    """The second is hung into a skeleton of the first, and comes out as transformers alone computes it."""
    other = _bert(tmp_path / "other", 2, hidden=32, vocabulary=200)
    family, copies = DenseFamily(), Copies(tmp_path / "copies", 100 * MIB)
    models = [_loaded(family, path, copies) for path in (one, other)]
    for model, path in zip(models, (one, other), strict=True):
        assert _cosine(_vector(model), _reference(path)) > 0.999
    assert _cosine(_vector(models[0]), _vector(models[1])) < 0.999


def test_an_eviction_is_told_with_its_reason(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(device_memory=2_000_000)
    host = live.ready()[0].id
    one, two, three = (live.spec(f"fake/{name}") for name in ("one", "two", "three"))
    for spec in (one, two, three):
        live.run(host, spec, "x")
    told = _mirrors(live)[0]
    assert (told["spec"], told["reason"], told["needed_by"]) == (one.digest, "room", three.digest)
    assert [one["spec"] for one in told["alternatives"]] == [two.digest]


def test_an_idle_model_is_unloaded_unless_a_caller_wants_it_kept(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host = live.ready()[0].id
    fleeting, asked = live.spec("fake/fleeting"), live.spec("fake/asked")
    fleeting = msgspec.structs.replace(fleeting, placement=Placement(idle_unload_s=0.1))
    asked = msgspec.structs.replace(asked, placement=Placement(idle_unload_s=0.1))
    body = encode_body(asked.id, Request(items=[{"text": "x"}], options={"keep_alive": 60}))
    batch = live.send(host, asked, bodies=(body,))
    live.until(lambda: batch in live.events.done, "an answer")
    live.run(host, fleeting, "x")
    live.until(lambda: fleeting.digest not in live.pool.hosts()[0].resident, "the idle model to leave")
    assert _mirrors(live)[-1]["reason"] == "idle"
    assert asked.digest in live.pool.hosts()[0].resident


def test_a_pin_set_while_a_model_is_resident_counts_without_a_load(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(device_memory=2_000_000)
    host = live.ready()[0].id
    kept = live.spec("fake/kept")
    live.run(host, kept, "x")
    pinned = msgspec.structs.replace(kept, placement=Placement(pinned=True))
    assert pinned.digest == kept.digest
    live.pool.place([pinned])
    for number in range(4):
        live.run(host, live.spec(f"fake/{number}"), "x")
    assert kept.digest in live.pool.hosts()[0].resident
    live.pool.place([kept])
    for number in range(4):
        live.run(host, live.spec(f"fake/{number}"), "x")
    assert kept.digest not in live.pool.hosts()[0].resident
    assert sum(event == "loaded" and spec == kept.digest for _, spec, event, _ in live.events.models) == 1


def test_a_host_is_ready_when_its_pinned_models_are_loaded_and_warm(start_pool: Callable[..., LivePool]) -> None:
    preloads: list[ModelSpec] = []
    live = start_pool(preloads=lambda: preloads)
    pinned = msgspec.structs.replace(live.spec("fake/pinned", load_ms=200), placement=Placement(pinned=True))
    broken = live.spec("fake/broken", load_fails="permanent")
    preloads += [pinned, broken]
    host = live.ready()[0]
    assert host.resident == {pinned.digest: 1_000_000}
    assert not host.loading
    batch = live.send(host.id, pinned, "x")
    live.until(lambda: batch in live.events.done, "an answer")
    assert live.events.done[batch][1].load_s == 0.0


def test_a_host_whose_memory_grows_is_replaced_after_its_work(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(growth_bytes=50 * MIB)
    host = live.ready()[0].id
    process = live.process(host)
    live.run(host, live.spec(), "x")
    leaking = live.send(host, live.spec(), "!leak:100", "!sleep:1.5")
    live.until(lambda: any(view.id != host for view in live.pool.hosts()), "a replacement")
    live.until(lambda: live.events.lost, "the end of the grown host")
    assert leaking in live.events.done
    assert live.events.lost[0][1:3] == ([], [])
    assert "grew by more than 52,428,800 bytes" in live.events.lost[0][3]
    assert not process.is_running() or process.status() == "zombie"
    assert np.array_equal(_run(live, live.pool.hosts()[0].id, live.spec()), fake_vector(TEXT))


def test_hot_models_stay_through_a_sweep(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(device_memory=8_000_000)
    host = live.ready()[0].id
    hot = [live.spec(f"fake/hot{n}") for n in range(4)]
    for spec in hot:
        live.run(host, spec, "x")
    apart = time.monotonic() + 1.0
    live.until(lambda: time.monotonic() > apart, "a second to pass")
    for spec in hot:
        live.run(host, spec, "x")
    for number in range(40):
        live.run(host, live.spec(f"fake/sweep{number}"), "x")
    resident = live.pool.hosts()[0].resident
    assert all(spec.digest in resident for spec in hot)


def test_passes_of_many_shapes_leave_little_behind(start_pool: Callable[..., LivePool], folders: list[Path]) -> None:
    """Libraries keep what they have prepared for a shape, and a padding-free pass has nearly always one of its own."""
    live = start_pool(
        model_dirs=(str(folders[0].parent),), preimport=("workers.host.families.dense",), device_memory=1000 * MIB
    )
    host, spec = live.ready()[0].id, _dense(folders[0])

    def memory_after(totals: range) -> int:
        for tokens in totals:
            live.run(host, spec, *["a" * 50] * (tokens // 50), "b" * (tokens % 50 or 1))
        return _rss(live, host)

    before = memory_after(range(50, 250))
    assert memory_after(range(250, 650)) < before + 60 * MIB  # kept whole, they are 200 MiB
