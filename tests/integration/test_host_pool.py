"""What the pool is asked and what it tells, over real hosts: micro-batches, parts, hints."""

from collections.abc import Callable
from time import monotonic

import numpy as np
from kombu.asynchronous.hub import Hub

from tasks.messages import Request, encode_body
from tasks.names import Operation
from tests.fakes.family import fake_vector
from tests.hosts import LONG_S, LivePool, code, vector
from workers.hosts.protocol import HostBatch


def test_a_batch_comes_back_part_by_part(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host = live.ready()[0].id
    spec = live.spec(dim=33)
    parts = live.run(host, spec, "one", "two words", "three words here")
    for part, text in zip(parts, ("one", "two words", "three words here"), strict=True):
        assert np.array_equal(vector(part), fake_vector(text, 33))
    assert [part.tokens for part in parts] == [1, 2, 3]
    timing = live.events.done[1][1]
    assert timing.tokens == 6
    assert timing.load_s > 0
    assert live.pool.hosts()[0].outstanding == 0
    assert live.pool.hosts()[0].resident == {spec.digest: 1_000_000}


def test_one_batch_is_prepared_while_another_is_computed(start_pool: Callable[..., LivePool]) -> None:
    """Both notes stand on the board at once; the order of answers stays the order of sending."""
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec(prepare_ms=150)
    live.run(host, spec, "warm")
    first = live.send(host, spec, "!sleep:0.6")
    live.computing(host, first)
    second = live.send(host, spec, "b")
    board = live.pool._hosts[host].board
    live.until(lambda: {(note.stage, note.batch) for note in board.doing()} == {(3, first), (2, second)}, "overlap")
    live.until(lambda: second in live.events.done, "both results")
    assert live.events.order[-2:] == [first, second]


def test_only_the_raising_part_of_eight_fails(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    texts = [f"t{number}" for number in range(7)]
    parts = live.run(live.ready()[0].id, live.spec(), *texts[:3], "!raise", *texts[3:])
    assert [code(part) for part in parts] == [None] * 3 + ["INFERENCE_ERROR"] + [None] * 4
    assert "told to raise" in (parts[3].error or {})["message"]
    assert live.events.lost == []


def test_refused_and_damaged_parts_fail_alone(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec()
    good = encode_body(spec.id, Request(items=[{"text": "good"}]))
    refused = encode_body(spec.id, Request(items=[{"text": "!refuse"}]))
    batch = live.send(host, spec, bodies=(b"\xc1 no msgpack", good, refused))
    live.until(lambda: batch in live.events.done, "results")
    codes = [code(part) for part in live.events.done[batch][0]]
    assert codes == ["MESSAGE_REFUSED", None, "INVALID_INPUT"]


def test_an_adapter_nobody_has_is_an_error_not_the_base_model(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec()
    body = encode_body(spec.id, Request(items=[{"text": "x"}]))
    live.pool.send(host, HostBatch(1, spec, Operation.ENCODE, ("some-lora",), (body,), LONG_S))
    live.until(lambda: 1 in live.events.done, "an answer")
    assert code(live.events.done[1][0][0]) == "INVALID_INPUT"


def test_a_request_too_large_for_the_device_fails_alone(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    parts = live.run(live.ready()[0].id, live.spec(), "a", "!oom", "b")
    assert [code(part) for part in parts] == [None, "RESOURCE_EXHAUSTED", None]


def test_a_hint_loads_beside_the_running_batch(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, one, two = live.ready()[0].id, live.spec("fake/one"), live.spec("fake/two", load_ms=50)
    live.run(host, one, "warm")
    running = live.send(host, one, "!sleep:0.5")
    live.computing(host, running)
    live.pool.load(host, two)
    live.until(lambda: two.digest in live.pool.hosts()[0].resident, "the hinted model")
    assert running not in live.events.done
    assert live.events.models[-1][1:3] == (two.digest, "loaded")
    live.until(lambda: running in live.events.done, "results")


def test_a_hint_for_a_broken_model_fails_it_once(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, broken = live.ready()[0].id, live.spec(load_fails="permanent")
    for _ in range(2):
        live.pool.load(host, broken)
        live.until(lambda: not live.pool.hosts()[0].loading, "the end of the hinted load")
    assert [event for _, _, event, _ in live.events.models] == ["load_failed"]


def test_a_resident_model_is_served_while_another_loads(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, one, slow = live.ready()[0].id, live.spec("fake/one"), live.spec("fake/slow", load_ms=700)
    live.run(host, one, "warm")
    waiting = live.send(host, slow, "a")
    served = live.send(host, one, "b")
    live.until(lambda: served in live.events.done, "the resident model's results")
    assert waiting not in live.events.done
    live.until(lambda: waiting in live.events.done, "the loaded model's results")


def test_a_broken_model_fails_every_part_and_is_not_tried_again_at_once(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec(load_fails="permanent")
    parts = live.run(host, spec, "a", "b")
    assert [code(part) for part in parts] == ["MODEL_LOAD_FAILED"] * 2
    assert {name: (parts[0].error or {})[name] for name in ("error_class", "permanent", "attempts")} == {
        "error_class": "CONFIG",
        "permanent": True,
        "attempts": 1,
    }
    again = live.run(host, spec, "c")[0].error or {}
    assert again["attempts"] == 1
    assert [event for _, _, event, _ in live.events.models] == ["load_failed"]


def test_bodies_and_results_of_many_megabytes(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec(dim=500_000)
    text = "x" * 10 * 2**20
    started = monotonic()
    batch = live.send(host, spec, text, "small", text)
    assert monotonic() - started < 1.0  # nothing waited for the host to read
    live.until(lambda: batch in live.events.done, "results")
    parts = live.events.done[batch][0]
    for part, sent in zip(parts, (text, "small", text), strict=True):
        assert np.array_equal(vector(part), fake_vector(sent, 500_000))


def test_registering_again_after_a_reset_goes_on(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec()
    live.run(host, spec, "warm")
    text = "x" * 5 * 2**20
    batch = live.send(host, spec, text)  # more than the socket takes: the writer is registered, too
    live.hub.reset()
    live.hub.close()
    live.hub = Hub()
    live.hub.call_repeatedly(0.02, lambda: None)
    live.pool.register(live.hub)
    live.pool.register(live.hub)
    live.until(lambda: batch in live.events.done, "results")
    assert code(live.run(host, spec, "after")[0]) is None
    live.process(host).kill()
    live.until(lambda: live.events.lost, "loss")
    live.ready()
