"""Finds the directory that holds a model's files (local directories only, so far)."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import ModelLoadError
from config_db.spec import Source


def resolve(source: Source, *, allowed_roots: Sequence[Path], cache_dir: Path | None) -> Path:
    """The directory of a model's files; ModelLoadError names what was tried."""
    place = Path(source.path).resolve() if source.path else None
    if place and place.is_dir() and any(place.is_relative_to(root.resolve()) for root in allowed_roots):
        return place
    raise ModelLoadError(
        f"no local directory {source.path!r} under the allowed roots {[str(root) for root in allowed_roots]}",
        details={"error_class": "NOT_FOUND", "permanent": True},
    )
