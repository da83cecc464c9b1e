"""Tokenizers by their content: models that come with the same one share it, and so does one that comes back."""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from workers.host.families.text_folder import load_tokenizer

KEPT_BYTES: Final = 64 * 2**20
"""Of their files; in memory a tokenizer is several times as large."""


class SharedTokenizers:
    """Those of one family in one host; the least recently asked for are forgotten first."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, int | None], tuple[Tokenizer, int]] = OrderedDict()

    def of(self, folder: Path, longest: int | None) -> Tokenizer:
        """As ``load_tokenizer`` gives it. It is shared: nobody may change it."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return load_tokenizer(folder, longest)
        content = path.read_bytes()
        key = (hashlib.sha256(content).hexdigest(), longest)
        known = self._held.pop(key, None)
        tokenizer = known[0] if known is not None else load_tokenizer(folder, longest)
        self._held[key] = (tokenizer, len(content))
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > KEPT_BYTES:
            self._held.popitem(last=False)
        return tokenizer
