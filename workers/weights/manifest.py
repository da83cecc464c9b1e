"""What a model's folder holds: names, sizes and digests, as a remote promises them and as they were verified."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from config_db.spec import WeightsFormat
from workers.weights.failures import DamagedError

SAFE: Final[tuple[WeightsFormat, ...]] = ("safetensors",)
"""The formats that weights may have unless a spec trusts others."""
_TEXTS: Final = ("*.json", "*.txt", "*.model", "*.jinja", "artifact.metadata")
_WEIGHTS: Final[Mapping[WeightsFormat, tuple[str, ...]]] = {
    "safetensors": ("*.safetensors",),
    "pickle": ("pytorch_model*.bin", "*/pytorch_model*.bin", "*.pt"),
}
"""Files that are weights, by format. Pickle can run code when it is read: it is fetched only where a spec trusts it."""
UNWANTED_FILES: Final = (
    *("onnx/*", "openvino/*", "coreml/*", "original/*", "consolidated*.safetensors", ".*"),
    *("optimizer.pt", "scheduler.pt"),
)
"""Copies of the same weights for other engines, and what training leaves behind."""
ENCODERS: Final = "encoders"
"""Under it lie the files of encoders that a model's own repository leaves out."""
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_PART: Final = re.compile(r"-\d+-of-\d+$")
_READ_BYTES: Final = 1 << 20


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file as a remote describes it.

    ``sha256`` or git's own ``blob`` id say what it must hold, ``etag`` which version of an object it is.
    """

    name: str
    size: int
    sha256: str | None = None
    blob: str | None = None
    etag: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A whole folder; in it every file has its ``sha256``. ``source`` is as a person reads it."""

    source: str
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.size for file in self.files)


def wanted_patterns(formats: Sequence[WeightsFormat] = SAFE) -> tuple[str, ...]:
    """Patterns of the files that a load reads; no format: all but weights."""
    return (*_TEXTS, *(pattern for name in formats for pattern in _WEIGHTS[name]))


def is_wanted(name: str, formats: Sequence[WeightsFormat] = SAFE) -> bool:
    """Whether a file of a repository may be needed to load the model; false for names that lead out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    return _matches(name, wanted_patterns(formats)) and not _matches(name, UNWANTED_FILES)


def chosen(names: Iterable[str], formats: Sequence[WeightsFormat] = SAFE) -> frozenset[str]:
    """The files to fetch: of weights that are there in both formats the safetensors alone."""
    found = {name for name in names if is_wanted(name, formats)}
    safe = {_stem(name) for name in found if name.endswith(".safetensors")}
    return frozenset(name for name in found if not _is_pickle(name) or _stem(name) not in safe)


def has_weights(names: Iterable[str]) -> bool:
    """Whether there are weights among files that were chosen."""
    return any(name.endswith(".safetensors") or _is_pickle(name) for name in names)


def verify(file: RemoteFile, path: Path) -> str:
    """The SHA-256 of a file on disk, once it is seen to be the promised one.

    Raises:
        DamagedError: it is not.
    """
    sha256, blob = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    blob.update(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while chunk := content.read(_READ_BYTES):
            sha256.update(chunk)
            if file.blob is not None:
                blob.update(chunk)
    found = sha256.hexdigest()
    is_other = file.sha256 is not None and found != file.sha256
    is_other_blob = file.sha256 is None and file.blob is not None and blob.hexdigest() != file.blob
    if path.stat().st_size != file.size or is_other or is_other_blob:
        raise DamagedError(f"{file.name} is not what was promised: its digest or size differs")
    return found


def _is_pickle(name: str) -> bool:
    return _matches(name, _WEIGHTS["pickle"])


def _stem(name: str) -> str:
    """Equal for the same weights in both formats: ``pytorch_model-00001-of-00002.bin`` and ``model.safetensors``."""
    path = PurePosixPath(name)
    return str(path.parent / _PART.sub("", path.stem.removeprefix("pytorch_")))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
