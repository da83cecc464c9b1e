"""Rows of unequal length as one tensor a kind of input, padded as the tokenizer's model expects."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def pad(rows: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Stack tokenised rows, padded on the right.

    Args:
        rows: what the tokenizer gave for each: ``input_ids`` and whatever else its model reads.
        tokenizer: the tokenizer, as transformers wraps it.

    Returns:
        int64 ``[B, T]`` for each name that the model reads, and ``attention_mask``, 1 on real tokens.
    """
    width = max(len(row["input_ids"]) for row in rows)
    fillers = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    names = [name for name in tokenizer.model_input_names if name in rows[0] and name != "attention_mask"]
    found = {}
    for name in names:
        filled = [[*row[name], *[fillers.get(name, 0)] * (width - len(row[name]))] for row in rows]
        found[name] = torch.tensor(filled, dtype=torch.int64)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    found["attention_mask"] = (torch.arange(width)[None] < lengths[:, None]).long()
    return found
