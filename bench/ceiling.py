"""The ceiling: the best padding-free run of the same texts in a process. Frozen; imports nothing of ours but texts.

``python -m bench.ceiling FOLDER PRECISION`` reads commands from stdin, one a line (``short 4``: short texts for 4
seconds; ``mixed 4``; ``one 4``: one short text at a time; ``library 4``: SentenceTransformer.encode of short texts in
batches of 32), and answers each with the texts per second as JSON. One thread: two of these processes use two cores.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel

from bench import texts

PASS_TOKENS = 1024
SAMPLE = 512
_blocks: list[tuple[int, int, int]] = []


def _attention(_module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: Any = None, **_: Any) -> Any:
    heads, tokens, width = query.shape[1:]
    out = torch.empty(tokens, heads, width, dtype=query.dtype)
    for start, count, length in _blocks:
        end = start + count * length
        q, k, v = (
            one[0, :, start:end].view(heads, count, length, width).transpose(0, 1) for one in (query, key, value)
        )
        quick = query.dtype == torch.bfloat16 and count * length >= 64 and length <= 512
        seen = _products(q, k, v, scaling) if quick else scaled_dot_product_attention(q, k, v, scale=scaling)
        out[start:end] = seen.transpose(1, 2).reshape(-1, heads, width)
    return out[None], None


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention by two products, keys filled to whole registers: in bfloat16 quicker than the fused kernel."""
    count, heads, length, width = q.shape
    filled = -(-length // 32) * 32
    keys, values = q.new_zeros(2, count, heads, filled, width)
    keys[:, :, :length], values[:, :, :length] = k, v
    bias = q.new_zeros(filled)
    bias[length:] = -torch.inf
    rows = q.reshape(count * heads, length, width)
    scores = torch.baddbmm(bias.expand(len(rows), length, filled), rows, keys.flatten(0, 1).mT, alpha=scaling)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(count, heads, length, width)


class Ceiling:
    """One model and the texts to run through it."""

    def __init__(self, folder: Path, precision: str) -> None:
        torch.set_num_threads(1)
        AttentionInterface.register("ceiling", _attention)
        AttentionMaskInterface.register("ceiling", lambda *_, **__: None)
        self.folder = folder
        self.model = AutoModel.from_pretrained(folder, dtype=getattr(torch, precision), attn_implementation="ceiling")
        self.model.eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(256)

    def encode(self, batch: Sequence[str]) -> Any:
        """Vectors of a batch, sorted and packed to ``PASS_TOKENS``."""
        ids = sorted((one.ids for one in self.tokenizer.encode_batch_fast(list(batch))), key=len)
        vectors: list[torch.Tensor] = []
        rows: list[list[int]] = []
        tokens = 0
        for one in ids:
            if rows and tokens + len(one) > PASS_TOKENS:
                vectors += self._run(rows)
                rows, tokens = [], 0
            rows.append(one)
            tokens += len(one)
        vectors += self._run(rows)
        return normalize(torch.cat(vectors), dim=-1).numpy()

    def _run(self, rows: list[list[int]]) -> list[torch.Tensor]:
        _blocks.clear()
        start = 0
        for length in sorted({len(row) for row in rows}):
            count = sum(len(row) == length for row in rows)
            _blocks.append((start, count, length))
            start += count * length
        ids = torch.tensor([token for row in rows for token in row])[None]
        places = torch.cat([torch.arange(length).repeat(count) for _, count, length in _blocks])[None]
        with torch.inference_mode():
            run = self.model(input_ids=ids, position_ids=places, token_type_ids=torch.zeros_like(ids))
        states = run.last_hidden_state[0]
        return [states[s : s + n * length].view(n, length, -1).float().mean(1) for s, n, length in _blocks]

    def command(self, name: str, seconds: float) -> float:
        """Texts per second of one kind of run."""
        if name == "library":
            from sentence_transformers import SentenceTransformer

            library = SentenceTransformer(str(self.folder), device="cpu")
            return rate(lambda batch: library.encode(list(batch), batch_size=32), texts.short(SAMPLE), 32, seconds)
        if name == "one":
            return rate(self.encode, texts.short(SAMPLE), 1, seconds)
        sample = texts.short(SAMPLE) if name == "short" else texts.mixed(SAMPLE)
        return rate(self.encode, sample, SAMPLE // 2, seconds)


def rate(encode: Callable[[Sequence[str]], Any], sample: Sequence[str], size: int, seconds: float) -> float:
    """Texts per second over whole batches, for at least so many seconds, after a warm-up."""
    encode(sample[:size])
    done, place, started = 0, 0, perf_counter()
    while perf_counter() - started < seconds:
        encode(sample[place : place + size])
        done, place = done + size, (place + size) % len(sample)
    return done / (perf_counter() - started)


def main() -> None:
    """Serve commands until stdin ends."""
    ceiling = Ceiling(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(json.dumps(ceiling.command(name, float(seconds))), flush=True)


if __name__ == "__main__":
    main()
