"""What a model's folder holds: names, sizes and digests, as a remote promises them and as they were verified."""

import hashlib
import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from workers.weights.failures import DamagedError

WANTED_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "artifact.metadata")
"""Weights in other formats can run code when they are read, so they are not even fetched."""
UNWANTED_FILES: Final = ("onnx/*", "openvino/*", "coreml/*", "original/*", "consolidated*.safetensors", ".*")
"""Copies of the same weights for other engines."""
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
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


def is_wanted(name: str) -> bool:
    """Whether a file of a repository is needed to load the model; false for names that lead out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    return _matches(name, WANTED_FILES) and not _matches(name, UNWANTED_FILES)


def has_weights(names: list[str]) -> bool:
    """Whether there are weights among these files."""
    return any(name.endswith(".safetensors") for name in names)


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


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
