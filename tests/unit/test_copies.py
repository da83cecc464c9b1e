"""Converted weights on disk and in host memory: whole or not at all, shared, bounded."""

import itertools
import os
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import get_native_id
from time import monotonic

import pytest
import torch
from safetensors.torch import load_file

from tests.services import wait_until
from workers.host import flat
from workers.host.copies import BURST_S, NICE, WRITE_AFTER_S, Copies, Draft
from workers.host.flat import FlatWeights
from workers.host.host_memory import HostMemory

TENSORS = {
    "weight": torch.arange(3000, dtype=torch.float32).view(50, 60).to(torch.bfloat16),
    "scale": torch.tensor(0.5),
    "ids": torch.arange(7),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "empty": torch.empty(0, 4),
}
MANY = 10 * 2**20


def _same(found: FlatWeights | None) -> bool:
    assert found is not None
    tensors = found.tensors()
    return tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_what_was_kept_comes_back_as_it_was_and_reads_as_safetensors(tmp_path: Path) -> None:
    copies = Copies(tmp_path / "copies", MANY)
    assert copies.find("one") is None
    assert copies.keep("one", TENSORS, "a note")
    found = copies.find("one")
    assert found is not None
    assert found.note == "a note"
    assert _same(found)
    plain = load_file(tmp_path / "copies" / "one.safetensors")
    assert torch.equal(plain["weight"], TENSORS["weight"])


def test_copies_are_written_in_turn_and_what_waits_keeps_no_memory(tmp_path: Path) -> None:
    """However many models come at once: each is asked for its weights when its turn has come."""
    copies, asked, written = Copies(tmp_path, MANY), [], []

    def make(name: str) -> Draft | None:
        asked.append((name, list(written)))
        if name == "failing":
            raise RuntimeError("no memory")
        return None if name == "gone" else Draft(TENSORS, name, lambda: written.append(name))

    names = ["one", "gone", "failing", *map(str, range(6)), "last"]
    for name in names:
        copies.keep_soon(name, partial(make, name))
    wait_until(lambda: written[-1:] == ["last"], 20, "the last copy")
    kept = [name for name in names if name not in ("gone", "failing")]
    assert [name for name, _ in asked] == names
    assert written == kept
    assert asked[-1][1] == kept[:-1]  # it was asked after all before it were written
    assert all(_same(copies.find(name)) for name in kept)
    copies.keep_soon("gone", partial(make, "later"))  # the thread has ended, or has not: it is written either way
    wait_until(lambda: copies.find("gone") is not None, 20, "a copy asked for later")


def test_nothing_holds_the_tensors_any_more_when_it_is_told_that_they_are_kept(tmp_path: Path) -> None:
    """So that whoever is told can give the memory of those it had back."""
    copies, left = Copies(tmp_path, MANY), []

    def make() -> Draft:
        tensors = {"one": torch.zeros(10)}
        seen = weakref.ref(tensors["one"])
        return Draft(tensors, "", lambda: left.append(seen()))

    copies.keep_soon("one", make)
    wait_until(lambda: left, 20, "the copy")
    assert left == [None]


def test_a_note_may_stand_alone(tmp_path: Path) -> None:
    copies = Copies(tmp_path, MANY)
    copies.keep("note", {}, "alone")
    found = copies.find("note")
    assert found is not None
    assert (found.note, found.bytes, found.tensors()) == ("alone", 0, {})


def test_a_mapped_copy_costs_no_memory_of_its_own_and_is_not_written_back(tmp_path: Path) -> None:
    copies = Copies(tmp_path, MANY)
    copies.keep("one", TENSORS, "")
    first, second = copies.find("one"), copies.find("one")
    assert first is not None
    assert second is not None
    first.tensors()["weight"].zero_()
    assert torch.equal(second.tensors()["weight"], TENSORS["weight"])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[: len(data) // 2],
    "cut off in its header": lambda data: data[:5],
    "too long": lambda data: data + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_removed_and_made_again(tmp_path: Path, damage: str) -> None:
    copies = Copies(tmp_path, MANY)
    copies.keep("one", TENSORS, "")
    path = tmp_path / "one.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert copies.find("one") is None
    assert not path.exists()
    assert copies.keep("one", TENSORS, "")
    assert _same(copies.find("one"))


def test_the_least_recently_used_copy_makes_room(tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in TENSORS.values())
    copies = Copies(tmp_path, 3 * (size + 4096))
    for age, name in enumerate("abc"):
        copies.keep(name, TENSORS, "")
        os.utime(tmp_path / f"{name}.safetensors", (1000 + age, 1000 + age))
    mapped = copies.find("b")
    assert copies.find("a") is not None  # used just now
    os.utime(tmp_path / "b.safetensors", (1001, 1001))
    copies.keep("d", TENSORS, "")
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["a", "c", "d"]
    assert _same(mapped)  # whoever has it mapped keeps its pages


def test_what_does_not_fit_or_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    assert not Copies(tmp_path, 100).keep("one", TENSORS, "")
    (tmp_path / "file").write_text("no directory")
    assert not Copies(tmp_path / "file" / "copies", MANY).keep("one", TENSORS, "")
    assert list(tmp_path.glob("*.part")) == []


def test_a_part_that_a_dead_host_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".one.part"
    left.write_bytes(b"half")
    os.utime(left, (1000, 1000))
    Copies(tmp_path, MANY).keep("two", TENSORS, "")
    assert not left.exists()


def test_one_copy_brings_all_tensors_to_a_device() -> None:
    made = flat.gather(TENSORS)
    there = made.on("cpu")
    assert _same(made)
    assert _same(there)
    made.tensors()["weight"].zero_()
    assert _same(there)  # memory of its own


def test_host_memory_keeps_the_last_used_and_those_of_its_tier_longest() -> None:
    one = flat.gather(TENSORS)
    memory = HostMemory(3 * one.bytes)
    found: list[str] = []

    def bring(name: str, *, keep: bool = False) -> None:
        def find() -> FlatWeights:
            found.append(name)
            return flat.gather(TENSORS)

        assert _same(memory.bring(name, find, keep=keep))

    bring("kept", keep=True)
    for name in ("a", "b", "c", "b", "d", "b"):
        bring(name)
    assert found == ["kept", "a", "b", "c", "d"]
    bring("kept", keep=True)
    assert found[-1] == "d"
    assert memory.bytes == 3 * one.bytes
    assert memory.bring("none", lambda: None) is None


def test_copies_are_written_after_a_burst_of_loads_by_a_thread_that_lets_others_go_first(tmp_path: Path) -> None:
    copies, begun, niceness = Copies(tmp_path, MANY), [], []

    def make(name: str) -> Draft:
        begun.append(monotonic())
        niceness.append(os.getpriority(os.PRIO_PROCESS, get_native_id()))
        return Draft(TENSORS, name, lambda: None)

    asked = monotonic()
    for name in ("one", "two"):
        copies.keep_soon(name, partial(make, name))
    wait_until(lambda: copies.find("two") is not None, 20, "the copies")
    assert begun[0] >= asked + WRITE_AFTER_S
    assert niceness == [NICE, NICE]
    assert os.getpriority(os.PRIO_PROCESS, get_native_id()) < NICE


def test_a_model_that_comes_again_before_its_copy_is_there_goes_first(tmp_path: Path) -> None:
    """Its first instance may have left by then: the newest one is asked."""
    copies, turns = Copies(tmp_path, MANY), []

    def ask(name: str, *, is_there: bool = True) -> None:
        def make() -> Draft | None:
            turns.append((name, is_there))
            return Draft(TENSORS, name, lambda: None) if is_there else None

        copies.keep_soon(name, make)

    ask("first")
    ask("again", is_there=False)
    ask("again")
    ask("gone", is_there=False)
    wait_until(lambda: len(turns) == 3, 20, "all turns")
    assert turns[0] == ("again", True)
    assert set(turns[1:]) == {("first", True), ("gone", False)}
    wait_until(lambda: not copies._pending, 20, "the thread to rest")
    ask("new")
    ask("gone")
    wait_until(lambda: len(turns) == 5, 20, "all turns")
    assert turns[3:] == [("gone", True), ("new", True)]
    assert all(_same(copies.find(name)) for name in ("first", "again", "gone"))


def test_loads_that_go_on_do_not_put_copies_off_for_ever(tmp_path: Path) -> None:
    copies, begun = Copies(tmp_path, MANY), []
    names, asked = itertools.count(), [monotonic()]

    def load_on() -> bool:
        copies.keep_soon(f"model-{next(names)}", lambda: begun.append(monotonic()))
        asked.append(monotonic())
        return bool(begun)

    wait_until(load_on, 20, "the first copy")
    stood_still = max(after - before for before, after in pairwise(asked)) >= WRITE_AFTER_S  # a machine that is busy
    assert begun[0] - asked[0] >= BURST_S or stood_still
