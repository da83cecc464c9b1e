"""Room, leases and eviction, with models that are only a size."""

from threading import Event, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ResidencyFullError
from workers.host.residency import Eviction, Residency, Terms


class Weight:
    def __init__(self, size: int) -> None:
        self.bytes = size
        self.is_closed = False

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


class Room:
    """A residency of ``budget`` bytes that remembers what left it."""

    def __init__(self, budget: int, *, stay_s: float = 0.0, apart_s: float = 1.0) -> None:
        self.evictions: list[Eviction] = []
        self.residency: Residency[Weight] = Residency(budget, self.evictions.append, stay_s=stay_s, apart_s=apart_s)

    @property
    def left(self) -> list[tuple[str, str]]:
        return [(one.key, one.reason) for one in self.evictions]

    def load(
        self, key: str, size: int, *, estimate: int | None = None, pinned: bool = False, wait_s: float = 0.0
    ) -> Weight:
        weight = Weight(size)
        with self.residency.reserved(key, size if estimate is None else estimate, wait_s=wait_s):
            self.residency.admit(key, weight, Terms(held=pinned))
        return weight

    @property
    def keys(self) -> list[str]:
        return list(self.residency.resident())


def test_the_least_recently_leased_leaves_first_and_no_more_than_needed() -> None:
    room = Room(30)
    oldest = room.load("a", 10)
    for key in "bc":
        room.load(key, 10)
    assert room.residency.lease("a") is oldest
    room.residency.release("a")
    room.load("d", 10)
    assert room.keys == ["c", "a", "d"]
    assert room.left == [("b", "room")]


def test_what_only_makes_a_model_quicker_is_booked_before_it_is_made_and_displaces_nobody() -> None:
    room = Room(30)
    model = room.load("a", 10)
    with room.residency.reserved("b", 15):  # a load under way was promised these bytes
        assert not room.residency.take_spare("a", model, 10)
        assert room.residency.take_spare("a", model, 5)
    assert not room.residency.take_spare("a", Weight(10), 1)
    assert not room.residency.take_spare("gone", model, 1)
    room.load("b", 15)
    assert not room.residency.take_spare("a", model, 1)
    assert room.residency.resident() == {"a": 15, "b": 15}
    assert not room.left
    room.residency.grow("a", model, -5)
    assert room.residency.used_bytes == 25


def test_a_leased_or_pinned_model_never_leaves_for_room() -> None:
    room = Room(20)
    room.load("pinned", 10, pinned=True)
    room.load("leased", 10)
    room.residency.lease("leased")
    with pytest.raises(ResidencyFullError):
        room.load("new", 10)
    assert room.keys == ["pinned", "leased"]


def test_a_model_larger_than_the_budget_is_refused_and_evicts_nothing() -> None:
    room = Room(20)
    room.load("a", 10)
    with pytest.raises(ResidencyFullError, match="21 bytes"):
        room.load("huge", 21)
    assert room.keys == ["a"]


def test_a_model_measured_larger_than_estimated_evicts_more_or_goes_itself() -> None:
    room = Room(30)
    room.load("a", 10)
    room.load("b", 10)
    room.load("grew", 20, estimate=5)
    assert room.keys == ["b", "grew"]
    with pytest.raises(ResidencyFullError):
        room.load("outgrew", 31, estimate=5)
    assert room.residency.used_bytes == sum(room.residency.resident().values()) <= 30


def test_a_refused_model_is_closed() -> None:
    room, weight = Room(10), Weight(11)
    with pytest.raises(ResidencyFullError), room.residency.reserved("a", 5):
        room.residency.admit("a", weight)
    assert weight.is_closed
    assert room.residency.used_bytes == 0


def test_a_failed_load_gives_its_room_back() -> None:
    room = Room(10)
    with pytest.raises(ZeroDivisionError), room.residency.reserved("a", 10):
        raise ZeroDivisionError
    assert room.residency.used_bytes == 0


def test_evicting_a_leased_model_waits_for_its_lease() -> None:
    room = Room(10)
    weight = room.load("a", 10)
    room.residency.lease("a")
    assert room.residency.evict("a")
    assert not weight.is_closed
    room.residency.release("a")
    assert weight.is_closed
    assert room.left == [("a", "removed")]
    assert not room.residency.evict("a")


def test_a_model_leased_again_before_it_could_be_evicted_stays() -> None:
    room = Room(10)
    weight = room.load("a", 10)
    room.residency.lease("a")
    room.residency.evict("a")
    assert room.residency.lease("a") is weight
    room.residency.release("a")
    room.residency.release("a")
    assert room.keys == ["a"]


def test_a_load_waits_for_a_lease_that_is_in_its_way() -> None:
    room, loaded = Room(10), Event()
    room.load("a", 10)
    room.residency.lease("a")

    def load() -> None:
        room.load("b", 10, wait_s=10.0)
        loaded.set()

    thread = Thread(target=load)
    thread.start()
    assert not loaded.is_set()
    room.residency.release("a")
    assert loaded.wait(5.0)
    thread.join()
    assert room.keys == ["b"]


def test_a_hint_leaves_alone_what_was_used_just_now() -> None:
    room = Room(10)
    room.load("a", 10)
    with pytest.raises(ResidencyFullError), room.residency.reserved("b", 10, idle_s=60.0):
        pytest.fail("room was made")
    assert room.keys == ["a"]


def test_out_of_memory_evicts_everything_idle() -> None:
    room = Room(40)
    for key, pinned in (("pinned", True), ("leased", False), ("idle", False)):
        room.load(key, 10, pinned=pinned)
    room.residency.lease("leased")
    assert room.residency.evict_idle() == 10
    assert room.keys == ["pinned", "leased"]


def test_what_a_large_leaver_makes_unnecessary_stays() -> None:
    room = Room(30)
    room.load("small", 5)
    room.load("large", 20)
    room.load("new", 20)
    assert room.left == [("large", "room")]


def test_a_sweep_over_many_models_leaves_the_hot_ones() -> None:
    """Six hot models of ten places, 100 others once each, twice over: LRU would have lost all six each time."""
    room = Room(100, apart_s=0.0)
    hot = [f"hot{n}" for n in range(6)]
    for key in hot:
        room.load(key, 10)
    for sweep in range(2):
        for number in range(100):
            if number % 10 == 0:
                for key in hot:
                    assert room.residency.lease(key) is not None, f"{key} left in sweep {sweep}"
                    room.residency.release(key)
            room.load(f"cold{number}", 10)
    assert not {key for key, _ in room.left} & set(hot)


def test_hot_models_leave_too_when_there_is_nothing_else() -> None:
    room = Room(40, apart_s=0.0)
    for key in "abcd":
        room.load(key, 10)
        room.residency.lease(key)
        room.residency.release(key)
    room.load("huge", 40)
    assert room.keys == ["huge"]


def test_a_model_that_comes_back_soon_is_hot() -> None:
    room = Room(40, apart_s=60.0)
    for key in "abcd":
        room.load(key, 10)
    room.load("e", 10)  # a leaves
    room.load("a", 10)  # b leaves, and a is hot now
    for number in range(10):
        room.load(f"once{number}", 10)
    assert "a" in room.keys


def test_what_was_loaded_and_has_not_served_leaves_last() -> None:
    room = Room(20, stay_s=60.0)
    room.load("new", 10)
    room.load("served", 10)
    room.residency.lease("served")
    room.residency.release("served")
    with pytest.raises(ResidencyFullError), room.residency.reserved("hinted", 20, idle_s=0.0001):
        pytest.fail("a hint made room of what has not served yet")
    room.load("next", 10)
    assert room.keys == ["new", "next"]


def test_an_eviction_says_who_needed_what_and_what_else_there_was() -> None:
    room = Room(40)
    room.load("pinned", 10, pinned=True)
    room.load("old", 10)
    room.load("used", 10)
    room.residency.lease("used")
    room.load("young", 5)
    room.load("new", 15)
    told = room.evictions[0].details()
    assert (told["reason"], told["needed_by"], told["needed_bytes"], told["missing_bytes"]) == ("room", "new", 15, 10)
    stayed = {one["spec"]: one["stays"] for one in told["alternatives"]}
    assert stayed == {"pinned": "held", "used": "leased", "young": "not needed"}


def _served(room: Room, key: str, *asked: float | None) -> None:
    room.residency.lease(key)
    room.residency.release(key, asked)


def test_an_idle_model_leaves_when_nobody_was_promised_more() -> None:
    room = Room(100)
    for key, idle_s in (("kept", None), ("soon", 0.0), ("later", 60.0)):
        room.load(key, 10)
        room.residency.place(key, Terms(idle_unload_s=idle_s))
        _served(room, key, None)
    room.load("asked", 10)
    _served(room, "asked", 0.0)
    room.load("promised", 10)
    _served(room, "promised", 60.0, 0.0)
    room.load("plain", 10)
    _served(room, "plain", None)
    _served(room, "plain", 0.0)  # does not shorten what the one before may count on
    room.residency.unload_idle()
    assert room.left == [("soon", "idle"), ("asked", "idle")]


def test_a_pin_counts_at_once_and_so_does_its_end() -> None:
    room = Room(20)
    room.load("a", 10)
    room.load("b", 10)
    room.residency.place("a", Terms(held=True))
    room.load("c", 10)
    assert room.keys == ["a", "c"]
    room.residency.place("a", Terms())
    room.load("d", 10)
    assert room.keys == ["c", "d"]


_KEYS = st.sampled_from("abcdef")
_STEPS = st.one_of(
    st.tuples(st.just("load"), _KEYS, st.integers(1, 12), st.integers(1, 12), st.booleans()),
    st.tuples(st.just("lease"), _KEYS),
    st.tuples(st.just("release"), _KEYS),
    st.tuples(st.just("evict"), _KEYS),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_STEPS, max_size=40))
def test_never_over_budget_and_never_without_a_lease_holder_s_model(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """Whatever happens: bytes stay within the budget, leased and pinned models stay, the LRU order decides."""
    room, leases, weights, pinned_keys = Room(24), dict.fromkeys("abcdef", 0), {}, set()
    order: list[str] = []
    for step in steps:
        key, before = step[1], dict(room.residency.resident())
        gone_before = len(room.left)
        if step[0] == "load" and key not in before:
            try:
                weights[key] = room.load(key, step[2], estimate=step[3], pinned=step[4])
                pinned_keys.discard(key)
                pinned_keys |= {key} if step[4] else set()
                order.append(key)
            except ResidencyFullError:
                pass
            left = [name for name, _ in room.left[gone_before:]]
            could_leave = [name for name in order if name in before and not leases[name] and name not in pinned_keys]
            assert left == [name for name in could_leave if name in left]  # least recently used first
        elif step[0] == "lease" and key in before:
            assert room.residency.lease(key) is weights[key]
            leases[key] += 1
            order.remove(key)
            order.append(key)
        elif step[0] == "release" and leases[key]:
            room.residency.release(key)
            leases[key] -= 1
        elif step[0] == "evict":
            room.residency.evict(key)
        order = [name for name in order if name in room.residency.resident()]
        resident = room.residency.resident()
        assert room.residency.used_bytes == sum(resident.values()) <= 24
        assert all(not weights[name].is_closed for name, count in leases.items() if count)
        assert all(weights[name].is_closed == (name not in resident) for name in weights)
