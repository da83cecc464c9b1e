"""CLIP: texts end in a token of their own, whose state is the text's vector; attention looks back only."""

from collections.abc import Sequence

import numpy as np
from transformers import CLIPModel

from workers.host.families.image_text import ImageTextFamily
from workers.host.families.image_text_folder import Arrays, Kept, Kind


def text_inputs(rows: Sequence[Sequence[int]], kept: Kept) -> Arrays:
    """Token rows of one pass, each filled up with its own last token.

    No mask is needed: no token sees what comes after it, and the vector is that of the first end token.
    """
    ids = np.empty((len(rows), max(1, *map(len, rows))), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        ids[place, len(row) :] = row[-1] if row else kept.tokenizer.eos_token_id
    return {"input_ids": ids}


class ClipFamily(ImageTextFamily):
    """Loads CLIP models."""

    def __init__(self) -> None:
        super().__init__(Kind({"clip": CLIPModel}, text_inputs, is_padded_full=False))
