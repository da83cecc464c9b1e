"""Finds the directory that holds a model's files: a local one, the Hub cache on disk, or the Hugging Face Hub.

The tiers are tried in this order, and an error names those that were. What comes from the Hub is pinned to its
revision, holds safetensors only, and is shared by all processes of a machine: huggingface_hub locks and renames, so
that a partial file is never used. No torch.
"""

from collections.abc import Sequence
from errno import EACCES, EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import Final

from common.errors import ModelLoadError
from config_db.spec import Source

WANTED_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model", "*/config.json", "*/*.safetensors")
"""Weights in other formats can run code when they are read, so they are not even fetched."""
HUB_TIMEOUT_S: Final = 10.0


def resolve(
    source: Source, *, allowed_roots: Sequence[Path], cache_dir: Path | None, hub_timeout_s: float = HUB_TIMEOUT_S
) -> Path:
    """The directory of a model's files.

    Args:
        source: a path under one of the roots, or a Hub repository at a revision.
        allowed_roots: the only places local models may lie in.
        cache_dir: where Hub downloads are kept; None: where huggingface_hub keeps them.
        hub_timeout_s: how long the Hub may take to say that it has the repository.

    Raises:
        ModelLoadError: no tier has it; ``error_class`` says why.
    """
    if source.path is not None:
        return _local(Path(source.path), allowed_roots)
    if source.hub is None:
        raise _failure("its source names neither a path nor a Hub repository", "CONFIG", permanent=True)
    return _cached(source, cache_dir) or _download(source, source.hub, cache_dir, hub_timeout_s)


def _local(path: Path, allowed_roots: Sequence[Path]) -> Path:
    """A local directory; links are followed before the roots are compared."""
    place = path.resolve()
    if not any(place.is_relative_to(root.resolve()) for root in allowed_roots):
        raise _failure(f"{path} lies under none of the allowed model directories", "CONFIG", permanent=True)
    if not place.is_dir():
        raise _failure(f"there is no directory {path} on this worker", "NOT_FOUND", permanent=True)
    return place


def _cached(source: Source, cache_dir: Path | None) -> Path | None:
    """The repository in the Hub cache on disk, if all of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            str(source.hub),
            revision=source.revision,
            cache_dir=cache_dir,
            allow_patterns=list(WANTED_FILES),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    whole = Path(found)
    return whole if (whole / "config.json").exists() and any(whole.rglob("*.safetensors")) else None


def _download(source: Source, repository: str, cache_dir: Path | None, timeout_s: float) -> Path:
    """Fetch the repository; whoever comes first does, the others wait for it."""
    from httpx import HTTPError
    from huggingface_hub import HfApi, errors, snapshot_download

    revision = source.revision or "main"
    at = f"{repository}@{revision}"
    tried = f"it is not in the Hub cache on this worker's disk, and the Hub ({_endpoint()})"
    try:
        # One plain question first: a download of a pinned revision asks at once with retries, 83 s of them if need be.
        HfApi().model_info(repository, revision=revision, timeout=timeout_s)
        found = snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(WANTED_FILES),
            etag_timeout=timeout_s,
        )
    except errors.GatedRepoError as error:
        raise _failure(f"{at}: {tried} wants a token with its licence accepted", "GATED", permanent=True) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise _failure(f"{at}: {tried} knows no such repository or revision", "NOT_FOUND", permanent=True) from error
    except errors.HFValidationError as error:
        raise _failure(f"{at}: no repository can have this name", "CONFIG", permanent=True) from error
    except OSError as error:
        kind = "STORAGE" if error.errno in (ENOSPC, EDQUOT, EROFS, EACCES) else "NETWORK"
        raise _failure(f"{at}: {tried} does not give it: {_first_line(error)}", kind, permanent=False) from error
    except (HTTPError, ValueError) as error:  # httpx's own: a time-out, a connection that broke off
        raise _failure(f"{at}: {tried} does not give it: {_first_line(error)}", "NETWORK", permanent=False) from error
    return Path(found)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _failure(why: str, error_class: str, *, permanent: bool) -> ModelLoadError:
    return ModelLoadError(
        f"the model cannot be loaded: {why}", details={"error_class": error_class, "permanent": permanent}
    )
