"""The cache that huggingface_hub keeps on this machine: what other tools, or the operator, have put there is used.

It is only read. What Farmhand fetches lies in its own store, which it may also clear.
"""

from pathlib import Path

from workers.weights.leases import Files
from workers.weights.manifest import chosen, has_weights, wanted_patterns
from workers.weights.wanted import Wanted


def cached(wanted: Wanted, cache_dir: str | None) -> Files | None:
    """A repository at a revision, if all of it is there; never one whose encoders lie elsewhere."""
    if not wanted.is_plain:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            wanted.repository,
            revision=wanted.revision,
            cache_dir=cache_dir,
            allow_patterns=list(wanted_patterns(wanted.formats)),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, FileNotFoundError, HFValidationError):
        return None
    whole = Path(found)
    has_config = any(whole.glob("*config.json"))
    names = (str(path.relative_to(whole)) for path in whole.rglob("*"))
    return Files(whole) if has_config and has_weights(chosen(names, wanted.formats)) else None


def default_directory(cache_dir: str | None) -> Path:
    """Where the store lies unless it is said: on the disk that was meant for such files."""
    if cache_dir is not None:
        return Path(cache_dir) / "farmhand"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "farmhand"
