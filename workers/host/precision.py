"""Which number format a model runs in: as its spec says, or the quickest that is as good as float32 on this device."""

from functools import cache
from pathlib import Path
from typing import Final

import torch

from workers.host.families.protocol import Device

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAME: Final = 0.9995
"""Cosine to float32 that a lower precision must reach on every check text."""
CHECK_TEXTS: Final = (
    "ok",
    "How do I reset my password?",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Revenue rose 12.4% to $3.1 billion in Q3, while operating costs fell for the second quarter in a row.",
    "Die Katze schläft auf dem warmen Dach, und der Regen hört nicht auf.",
    "def add(a, b):\n    return a + b  # a small function, as a comment says",
    "In a long paragraph many sentences follow one another. Each adds a detail to the ones before: a name, a place, a "
    "number, a date. A reader keeps the thread only if the words that carry it return now and then, and if what is new "
    "stands at the end of its sentence, where one looks for it.",
)

FEW_CHECK_TEXTS: Final = CHECK_TEXTS[:3]
"""For weights of an architecture that other weights have been tried in."""
LONGEST_CHECK_WORDS: Final = 1024
"""A check must not take longer than the load it belongs to."""


def check_texts(window: int | None) -> list[str]:
    """The texts a model is tried with: one is longer than its attention reaches, where that has a bound."""
    if window is None:
        return list(CHECK_TEXTS)
    words = CHECK_TEXTS[-1].split()
    wanted = min(3 * window, LONGEST_CHECK_WORDS)
    return [*CHECK_TEXTS, " ".join(words * (1 + wanted // len(words)))]


def candidates(wanted: str, device: Device) -> tuple[str, ...]:
    """Precisions to try in order; the last is taken unchecked."""
    if wanted != "auto":
        return (wanted,)
    if _has_fast_bfloat16(device):
        return ("bfloat16", "float32")
    return ("float16", "float32") if device.kind == "cuda" else ("float32",)


def worst_cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    """The smallest cosine between rows of two ``[N, D]`` matrices; -1 if any is not a number."""
    cosines = torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1)
    return float(torch.nan_to_num(cosines, nan=-1.0).min())


def quick(device: Device) -> str:
    """The precision that is tried first on this device: what was found out there holds where it is the same."""
    return candidates("auto", device)[0]


def _has_fast_bfloat16(device: Device) -> bool:
    if device.kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"amx_bf16", "avx512_bf16"} & _cpu_flags())


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
