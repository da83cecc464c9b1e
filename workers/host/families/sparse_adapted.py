"""Sparse encoders with adapters: those on the encoder as elsewhere, those on the head over each piece of tokens."""

import numpy as np
import torch

from workers.host.adapted import divided
from workers.host.families.sparse import Head, Splade, States
from workers.host.families.sparse_folder import SparseFolder
from workers.host.families.token_encoder import TokenEncoder


class AdaptedSplade(Splade):
    """Runs encoder and head of each text through the adapter that owns it."""

    def __init__(self, module: torch.nn.Module, runner: TokenEncoder, folder: SparseFolder) -> None:
        super().__init__(module, runner, folder)
        self._device = str(next(module.parameters()).device)

    def _logits(self, texts: States, start: int) -> torch.Tensor:
        """As the base's; a text may be cut over several pieces."""
        states = texts.states[start : start + self.piece_tokens]
        bounds = np.clip([0, *texts.ends], start, start + len(states))
        counts = np.diff(bounds).tolist()
        rows = [place for place, count in zip(texts.places, counts, strict=True) if count]
        head = Head(self._module)  # made anew: an adapter that came since may have exchanged layers
        with divided(rows, [count for count in counts if count], axis=1, device=self._device):
            return head.logits(states)
