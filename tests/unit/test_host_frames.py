"""Frames, the board and item results, without processes."""

import os
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ModelLoadError, RequestError
from tasks import codec
from tests.fakes.family import PLACE, FakeFamily, fake_spec, fake_vector
from workers.host import frames, stages
from workers.host.families import registry, results
from workers.host.frames import Batch, Introduce, Load
from workers.host.stages import Board, Slot, Stage
from workers.hosts.watchdog import overdue


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 64))
def test_frames_survive_any_cutting(bodies: list[bytes], step: int) -> None:
    sent = [Batch(number, "d", "encode", None, [body]) for number, body in enumerate(bodies)]
    stream = b"".join(bytes(frames.frame(one)) for one in sent)
    unframer, got = frames.Unframer(), []
    for start in range(0, len(stream), step):
        got += [frames.to_host.decode(body) for body in unframer.feed(stream[start : start + step])]
    assert got == sent


def test_an_impossible_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a frame of"):
        list(frames.Unframer().feed(b"\xff\xff\xff\xff"))


def test_a_spec_crosses_with_its_digest(tmp_path: Path) -> None:
    spec = fake_spec(path=tmp_path, dim=7, bytes=5)
    body = next(iter(frames.Unframer().feed(bytes(frames.frame(Introduce(spec.digest, 1, spec))))))
    got = frames.to_host.decode(body)
    assert isinstance(got, Introduce)
    assert got.spec.digest == spec.digest == got.digest
    assert not isinstance(got, Load)


def test_the_board_shows_what_the_other_side_notes() -> None:
    descriptor = stages.create_board()
    host, worker = Board(descriptor), Board(descriptor)
    os.close(descriptor)
    assert worker.doing() == []
    with (
        host.noted(Slot.COMPUTE, Stage.COMPUTE, batch=7, spec_number=2),
        host.noted(Slot.READER, Stage.PREPARE, batch=8),
    ):
        notes = worker.doing()
        assert [(note.stage, note.batch, note.spec_number) for note in notes] == [
            (Stage.PREPARE, 8, 0),
            (Stage.COMPUTE, 7, 2),
        ]
        assert all(note.since > 0 for note in notes)
    assert worker.doing() == []
    host.close()
    worker.close()


def test_a_process_that_was_frozen_is_not_taken_for_hanging() -> None:
    descriptor = stages.create_board()
    board = Board(descriptor)
    os.close(descriptor)
    limits = {7: 0.0}
    with board.noted(Slot.COMPUTE, Stage.COMPUTE, batch=7):
        assert overdue(board, limits, excused=0.0) == "hang"
        assert overdue(board, limits, excused=monotonic() + 1.0) is None
        assert overdue(board, {8: 0.0}, excused=0.0) is None
    assert overdue(board, limits, excused=0.0) is None
    board.close()


def test_extra_families_come_first_and_an_unknown_one_is_named() -> None:
    assert isinstance(registry.find("fake", {"fake": PLACE}), FakeFamily)
    with pytest.raises(ModelLoadError, match=r"no model family 'fake'; known are .*dense") as refused:
        registry.find("fake", {})
    assert refused.value.details["permanent"]
    with pytest.raises(ModelLoadError, match="cannot be imported"):
        registry.find("fake", {"fake": "tests.fakes.no_such_module:Family"})


def test_fake_vectors_are_one_per_text() -> None:
    assert np.array_equal(fake_vector("a", 20), fake_vector("a", 20))
    assert not np.array_equal(fake_vector("a", 20), fake_vector("b", 20))
    assert fake_vector("a", 20).dtype == np.float32
    assert np.abs(fake_vector("a", 2000)).max() <= 1


def test_item_results_are_what_clients_read() -> None:
    rows = np.array([[0.5, -1.0, 0.25]], dtype=np.float32)
    read = codec.unpack(results.dense_items([{"id": "x", "text": "t"}], rows))
    assert read[0]["id"] == "x"
    assert read[0]["dense"]["dims"] == 3
    assert read[0]["dense"]["dtype"] == "float32"
    assert codec.array_of(read[0]["dense"]["values"]).tolist() == rows[0].tolist()
    assert "id" not in codec.unpack(results.dense_items([{"text": "t"}], rows))[0]


@pytest.mark.parametrize(
    ("dtype", "wire", "values"),
    [
        ("float16", "<f2", [0.5, -1.0, 0.25]),
        ("int8", "|i1", [64, -127, 32]),
        ("uint8", "|u1", [255, 0, 212]),
        ("binary", "|u1", [0b10100000]),
    ],
)
def test_output_dtypes(dtype: str, wire: str, values: list[float]) -> None:
    rows = np.array([[0.5, -1.0, 0.25]], dtype=np.float32)
    dense = codec.unpack(results.dense_items([{}], rows, dtype))[0]["dense"]
    assert (dense["dims"], dense["dtype"], dense["values"][b"type"]) == (3, dtype, wire)
    assert codec.array_of(dense["values"]).tolist() == values


def test_a_row_of_zeros_has_every_dtype() -> None:
    for dtype in results.OUTPUT_DTYPES:
        with np.errstate(all="raise"):
            assert not results.quantize(np.zeros((1, 8), dtype=np.float32), dtype).any()


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match="float32"):
        results.check_output_dtype("float8")


def test_all_refused_items_are_listed_and_the_first_speaks() -> None:
    error = results.item_errors({3: RequestError("third", param="c"), 1: RequestError("first", param="a")})
    assert (error.message, error.param) == ("first", "a")
    assert [item["index"] for item in error.details["items"]] == [1, 3]
