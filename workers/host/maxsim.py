"""Late interaction: how well the tokens of a query are met by those of documents.

No model, no requests.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

SIMILARITIES: Final = 2**24
"""Similarities of tokens at once: 64 MiB in float32."""

Vectors = npt.NDArray[np.float32]


def maxsim(query: Vectors, documents: Sequence[Vectors]) -> list[float]:
    """MaxSim of a query with each document: for each query token its best inner product, summed up.

    Args:
        query: ``[Q, D]``.
        documents: ``[T, D]`` each; one without tokens meets nothing and scores 0.
    """
    scores = [0.0] * len(documents)
    there = [place for place, document in enumerate(documents) if len(document)]
    if not len(query):
        return scores
    most = max(1, SIMILARITIES // len(query))
    for batch in _batches([len(documents[place]) for place in there], most):
        places = [there[one] for one in batch]
        tokens = torch.from_numpy(np.concatenate([documents[place] for place in places]))
        similar = (tokens @ torch.tensor(query).T).numpy()
        starts = np.cumsum([0, *(len(documents[place]) for place in places[:-1])])
        best = np.maximum.reduceat(similar, starts, axis=0)
        for place, score in zip(places, best.sum(axis=1, dtype=np.float64), strict=True):
            scores[place] = float(score)
    return scores


def _batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of documents that are computed together, in order; a longer one is alone."""
    batches: list[list[int]] = []
    tokens = 0
    for place, length in enumerate(lengths):
        if not batches or tokens + length > most:
            batches.append([])
            tokens = 0
        batches[-1].append(place)
        tokens += length
    return batches
