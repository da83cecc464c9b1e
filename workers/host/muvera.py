"""MUVERA: one vector of fixed width for the many of a text, whose inner products estimate MaxSim.

After Dhulipala, Hadian, Jayaram, Lee and Mirrokni, "MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings"
(arXiv:2405.19504). Random planes cut the space into partitions, several times over. In each partition the tokens of a
query are summed up and those of a document averaged; where a document has none, the nearest of its tokens stands in.
What was made is scaled so that the inner product of a query and a document estimates their MaxSim itself.

Encodings are stored and compared years apart, so that the random numbers come from numpy's legacy generator, whose
stream is frozen.
"""

from functools import lru_cache
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from common.errors import RequestError

MAX_NUMBERS: Final = 2**20
"""Numbers that one encoding may have, before the last projection."""


class Muvera(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How encodings are made; two of them can be compared only if they were made alike.

    ``2 ** num_simhash_projections`` partitions, cut ``num_repetitions`` times; tokens are projected to
    ``projection_dim`` numbers (None: as they are), and the whole to ``final_projection_dim`` (None: as it is). The
    defaults are the paper's for 10240 numbers. ``normalize``: to unit length, for cosine.
    """

    num_repetitions: Annotated[int, msgspec.Meta(ge=1, le=256)] = 20
    num_simhash_projections: Annotated[int, msgspec.Meta(ge=0, le=10)] = 5
    projection_dim: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = 16
    final_projection_dim: Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBERS)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 42
    normalize: bool = False

    def width(self, token_dims: int) -> int:
        """Numbers of an encoding before the last projection."""
        return self.num_repetitions * (1 << self.num_simhash_projections) * (self.projection_dim or token_dims)


def read_muvera(value: object, *, token_dims: int, param: str) -> Muvera | None:
    """The way to encode that an option asks for: true, a map of parameters, or nothing.

    Raises:
        RequestError: it is none, or its encodings would be too wide.
    """
    if value is None or value is False:
        return None
    try:
        asked = msgspec.convert({} if value is True else value, Muvera)
    except msgspec.ValidationError as error:
        raise RequestError(f"muvera is true or a map of its parameters: {error}", param=param) from error
    if asked.width(token_dims) > MAX_NUMBERS:
        message = f"encodings of {asked.width(token_dims)} numbers are wider than the {MAX_NUMBERS} there may be"
        raise RequestError(message, param=param)
    return asked


def fixed_vector(tokens: npt.NDArray[np.float32], way: Muvera, *, is_query: bool) -> npt.NDArray[np.float32]:
    """The encoding, ``[width]``, of a text's vectors ``[T, D]``."""
    randoms = _randoms(way, tokens.shape[1])
    partitions = 2**way.num_simhash_projections
    blocks = [
        _summed(tokens, randoms, repetition, partitions, is_query=is_query) for repetition in range(way.num_repetitions)
    ]
    whole = np.concatenate(blocks, axis=None) / np.sqrt(way.num_repetitions)
    if randoms.last is not None and way.final_projection_dim is not None:
        places, signs = randoms.last
        whole = np.bincount(places, weights=whole * signs, minlength=way.final_projection_dim)
    if way.normalize:
        whole = whole / max(float(np.linalg.norm(whole)), 1e-12)
    return np.asarray(whole, dtype=np.float32)


class _Randoms(msgspec.Struct, frozen=True):
    """What is drawn once: planes ``[R, D, k]``, projections ``[R, D, p]``, places and signs of the last projection."""

    planes: npt.NDArray[np.float32]
    projections: npt.NDArray[np.float32] | None
    last: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None


@lru_cache(maxsize=16)
def _randoms(way: Muvera, token_dims: int) -> _Randoms:
    draw = np.random.RandomState(way.seed)
    shape = (way.num_repetitions, token_dims)
    planes = draw.standard_normal((*shape, way.num_simhash_projections)).astype(np.float32)
    projections = None
    if way.projection_dim is not None:
        signs = draw.randint(0, 2, (*shape, way.projection_dim)) * 2 - 1
        projections = (signs / np.sqrt(way.projection_dim)).astype(np.float32)
    if way.final_projection_dim is None:
        return _Randoms(planes, projections, None)
    width = way.width(token_dims)
    places = draw.randint(0, way.final_projection_dim, width)
    return _Randoms(planes, projections, (places, (draw.randint(0, 2, width) * 2 - 1).astype(np.float32)))


def _summed(
    tokens: npt.NDArray[np.float32], randoms: _Randoms, repetition: int, partitions: int, *, is_query: bool
) -> npt.NDArray[np.float32]:
    """One repetition: ``[partitions, p]``."""
    bits = tokens @ randoms.planes[repetition] > 0
    homes = bits @ (1 << np.arange(bits.shape[1]))
    projected = tokens if randoms.projections is None else tokens @ randoms.projections[repetition]
    whole = torch.zeros(partitions, projected.shape[1])
    block = whole.index_add_(0, torch.tensor(homes), torch.tensor(projected)).numpy()
    if is_query or not len(tokens):
        return block
    counts = np.bincount(homes, minlength=partitions)
    block /= np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    differing = np.bitwise_count(empty[:, None] ^ homes[None, :])
    block[empty] = projected[differing.argmin(axis=1)]
    return block
