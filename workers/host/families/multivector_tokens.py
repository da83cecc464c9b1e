"""The tokens of queries and documents of a late-interaction encoder: marked, cut, filled up, some left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from workers.host.families.dense_folder import read_json, refusal
from workers.host.families.multivector_folder import MultivectorFolder
from workers.host.families.request_texts import Text
from workers.host.families.text_folder import load_tokenizer, longest_text

_FILLERS: Final = ("mask_token", "eos_token")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised text. ``seen``: how many of its first tokens others attend to; ``kept``: whose vectors count."""

    ids: list[int]
    seen: int
    kept: npt.NDArray[np.bool_]


class TokenReader:
    """Tokenises queries and documents as the folder wants them; any thread may call it."""

    def __init__(self, folder: MultivectorFolder) -> None:
        self._folder = folder
        place = folder.text.transformer
        self._tokenizer = load_tokenizer(place, None)
        self._longest = {
            True: longest_text(place, folder.query_length or folder.text.max_length),
            False: longest_text(place, folder.document_length or folder.text.max_length),
        }
        self._lock = Lock()  # a tokenizer holds one length at a time
        for marker in (folder.query_marker, folder.document_marker):
            _keep_whole(self._tokenizer, marker)
        self._filler = self._filler_id(place)
        found = (self._tokenizer.token_to_id(word) for word in folder.skipped)
        self._skipped = np.array(sorted(one for one in found if one is not None), dtype=np.int64)

    def read(self, texts: Sequence[Text]) -> list[Tokens]:
        """The tokens of texts, in order; a text of which nothing is said is a document."""
        rows: dict[int, Tokens] = {}
        for is_query in (True, False):
            places = [place for place, text in enumerate(texts) if bool(text.is_query) is is_query]
            marker = self._folder.query_marker if is_query else self._folder.document_marker
            encoded = self._encode([marker + texts[place].text for place in places], is_query=is_query)
            for place, ids in zip(places, encoded, strict=True):
                rows[place] = self._tokens(ids or [0], is_query=is_query)
        return [rows[place] for place in range(len(texts))]

    def _encode(self, texts: list[str], *, is_query: bool) -> list[list[int]]:
        longest = self._longest[is_query]
        with self._lock:
            if longest is None:
                self._tokenizer.no_truncation()
            else:
                self._tokenizer.enable_truncation(longest)
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def _tokens(self, ids: list[int], *, is_query: bool) -> Tokens:
        expansion = self._folder.expansion if is_query else None
        seen = len(ids)
        if expansion is not None and seen < expansion.length:
            ids = [*ids, *[self._filler] * (expansion.length - seen)]
            seen = len(ids) if expansion.is_seen else seen
        kept = np.ones(len(ids), dtype=np.bool_)
        if not is_query or self._folder.skips_queries:
            kept = ~np.isin(ids, self._skipped)
        return Tokens(ids, seen, kept)

    def _filler_id(self, place: Path) -> int:
        """The token that queries are filled up with: the one that is named, the mask, else the end of text."""
        if self._folder.expansion is None:
            return 0
        config = read_json(place / "tokenizer_config.json") or {}
        specials = read_json(place / "special_tokens_map.json") or {}
        for name in (self._folder.expansion.token, *(_special(kind, config, specials) for kind in _FILLERS)):
            found = None if name is None else self._tokenizer.token_to_id(name)
            if found is not None:
                return int(found)
        raise refusal("its queries are filled up with a token that its tokenizer does not have")


def _special(kind: str, *places: Any) -> str | None:
    for place in places:
        found = place.get(kind)
        content = found.get("content") if isinstance(found, dict) else found
        if isinstance(content, str):
            return content
    return None


def _keep_whole(tokenizer: Tokenizer, marker: str) -> None:
    """Let a marker that the vocabulary has be one token wherever it stands in a text, as in training."""
    for one in (marker, *marker.split(None, 1)[:1]):
        if one and tokenizer.token_to_id(one) is not None:
            if tokenizer.encode(one, add_special_tokens=False).tokens != [one]:
                tokenizer.add_special_tokens([AddedToken(one, normalized=False, special=True)])
            return
