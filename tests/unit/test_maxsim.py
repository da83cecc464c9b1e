"""MaxSim, and MUVERA's estimate of it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import RequestError
from workers.host import maxsim as late
from workers.host.maxsim import maxsim
from workers.host.muvera import MAX_NUMBERS, Muvera, fixed_vector, read_muvera

Rows = npt.NDArray[np.float32]


def unit(seed: int, count: int, dims: int = 32) -> Rows:
    rows = np.random.default_rng(seed).standard_normal((count, dims))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def plainly(query: Rows, document: Rows) -> float:
    return sum(max(float(one @ other) for other in document.astype(np.float64)) for one in query.astype(np.float64))


def test_each_query_token_counts_its_best_match() -> None:
    query, documents = unit(1, 5), [unit(2, 7), unit(3, 1), unit(4, 30)]
    assert maxsim(query, documents) == pytest.approx([plainly(query, one) for one in documents], abs=1e-6)


def test_what_is_computed_together_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, documents = unit(1, 4), [unit(seed, seed % 9 + 1) for seed in range(40)]
    together = maxsim(query, documents)
    for most in (1, 4 * 9, 4 * 20):
        monkeypatch.setattr(late, "SIMILARITIES", most)
        assert maxsim(query, documents) == pytest.approx(together, abs=1e-6)


def test_a_text_without_tokens_meets_nothing() -> None:
    empty = np.zeros((0, 32), dtype=np.float32)
    query = unit(1, 3)
    scores = maxsim(query, [empty, unit(2, 4), empty])
    assert (scores[0], scores[2]) == (0.0, 0.0)
    assert scores[1] == pytest.approx(plainly(query, unit(2, 4)), abs=1e-6)
    assert maxsim(empty, [unit(2, 4)]) == [0.0]
    assert maxsim(query, []) == []


def by_hand(tokens: Rows, way: Muvera, *, is_query: bool) -> npt.NDArray[Any]:
    """The encoding as the paper words it, token by token, from the same random numbers."""
    draw = np.random.RandomState(way.seed)
    dims, bits = tokens.shape[1], way.num_simhash_projections
    planes = draw.standard_normal((way.num_repetitions, dims, bits))
    assert way.projection_dim is not None
    signs = draw.randint(0, 2, (way.num_repetitions, dims, way.projection_dim)) * 2 - 1
    whole = []
    for repetition in range(way.num_repetitions):
        homes = [tuple(bool(one @ plane > 0) for plane in planes[repetition].T) for one in tokens]
        inner = [one @ signs[repetition] / way.projection_dim**0.5 for one in tokens]
        for number in range(2**bits):
            place = tuple(bool(number >> bit & 1) for bit in range(bits))
            here = [vector for vector, home in zip(inner, homes, strict=True) if home == place]
            if is_query:
                whole.append(np.sum(here, axis=0) if here else np.zeros(way.projection_dim))
            elif here:
                whole.append(np.mean(here, axis=0))
            else:
                distances = [sum(a != b for a, b in zip(home, place, strict=True)) for home in homes]
                whole.append(inner[distances.index(min(distances))])
    return np.concatenate(whole) / way.num_repetitions**0.5


@pytest.mark.parametrize("is_query", [True, False])
def test_encodings_are_made_as_the_paper_says(is_query: bool) -> None:
    way = Muvera(num_repetitions=3, num_simhash_projections=4, projection_dim=8)
    tokens = unit(5, 11)
    found = fixed_vector(tokens, way, is_query=is_query)
    assert found.shape == (3 * 16 * 8,)
    np.testing.assert_allclose(found, by_hand(tokens, way, is_query=is_query), atol=1e-5)


def test_inner_products_of_encodings_estimate_maxsim() -> None:
    """A document that repeats the query's tokens comes first, and the numbers are near."""
    way = Muvera(num_repetitions=64, num_simhash_projections=6, projection_dim=None)
    query = unit(1, 8)
    documents = [np.concatenate([query[: 8 - 2 * n], unit(n + 50, 12)]) for n in range(4)]
    asked = fixed_vector(query, way, is_query=True)
    estimated = [float(asked @ fixed_vector(one, way, is_query=False)) for one in documents]
    exact = maxsim(query, documents)
    assert np.argsort(estimated).tolist() == np.argsort(exact).tolist()
    assert np.corrcoef(estimated, exact)[0, 1] > 0.95


def test_the_last_projection_keeps_inner_products() -> None:
    narrow = Muvera(num_repetitions=20, final_projection_dim=4096)
    tokens = unit(7, 12)
    ways = (Muvera(num_repetitions=20), narrow)
    wide, small = (
        float(fixed_vector(tokens[:6], way, is_query=True) @ fixed_vector(tokens, way, is_query=False)) for way in ways
    )
    assert fixed_vector(tokens, narrow, is_query=True).shape == (4096,)
    assert small == pytest.approx(wide, rel=0.25)


def test_encodings_are_the_same_for_ever() -> None:
    """They are stored: whoever changes a number of this makes stored ones worthless."""
    tokens = np.sin(np.arange(160) ** 1.5).reshape(5, 32).astype(np.float32)
    way = Muvera(num_repetitions=2, num_simhash_projections=2, projection_dim=2, final_projection_dim=5)
    kept = ([-1.10611, 0.0, -0.48008, -5.57243, -1.22104], [-1.39176, 0.0, -0.96096, -0.66641, 2.96333])
    for is_query, wanted in zip((True, False), kept, strict=True):
        np.testing.assert_allclose(fixed_vector(tokens, way, is_query=is_query), wanted, atol=1e-5)


def test_an_encoding_may_have_unit_length() -> None:
    assert np.linalg.norm(fixed_vector(unit(1, 4), Muvera(normalize=True), is_query=True)) == pytest.approx(1, abs=1e-5)


def test_a_text_without_tokens_has_an_encoding_of_zeros() -> None:
    empty = np.zeros((0, 32), dtype=np.float32)
    for is_query in (True, False):
        assert not fixed_vector(empty, Muvera(), is_query=is_query).any()


@pytest.mark.parametrize(
    "value",
    [
        "yes",
        7,
        [1],
        {"num_repetitions": "3"},
        {"num_repetitions": 0},
        {"num_simhash_projections": 11},
        {"seed": -1},
        {"planes": 3},
        {"num_repetitions": 256, "num_simhash_projections": 10, "projection_dim": None},
    ],
)
def test_a_way_that_is_none_is_refused_by_name(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        read_muvera(value, token_dims=32, param="params.options.muvera")
    assert caught.value.param == "params.options.muvera"


def test_ways_may_be_left_out() -> None:
    assert read_muvera(None, token_dims=32, param="p") is None
    assert read_muvera(False, token_dims=32, param="p") is None
    assert read_muvera(True, token_dims=32, param="p") == Muvera()
    assert Muvera().width(128) == 10240 <= MAX_NUMBERS
