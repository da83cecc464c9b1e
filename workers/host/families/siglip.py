"""SigLIP and SigLIP 2: texts are filled up to the model's full length, as it was trained; the last state counts."""

from collections.abc import Sequence

import numpy as np
from transformers import Siglip2Model, SiglipModel

from workers.host.families.image_text import ImageTextFamily
from workers.host.families.image_text_folder import Arrays, Kept, Kind


def text_inputs(rows: Sequence[Sequence[int]], kept: Kept) -> Arrays:
    """Token rows of one pass, padded to the model's length; with a mask only where its tokenizer gives one."""
    tokenizer = kept.tokenizer
    ids = np.full((len(rows), kept.longest), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        start = kept.longest - len(row) if tokenizer.padding_side == "left" else 0
        ids[place, start : start + len(row)] = row
        mask[place, start : start + len(row)] = 1
    return (
        {"input_ids": ids, "attention_mask": mask} if _gives_mask(tokenizer.model_input_names) else {"input_ids": ids}
    )


def _gives_mask(names: Sequence[str]) -> bool:
    return "attention_mask" in names


class SiglipFamily(ImageTextFamily):
    """Loads SigLIP models, of fixed and of variable resolution."""

    def __init__(self) -> None:
        models = {"siglip": SiglipModel, "siglip2": Siglip2Model}
        super().__init__(Kind(models, text_inputs, is_padded_full=True))
