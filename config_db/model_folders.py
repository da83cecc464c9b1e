"""Directories that hold a model, as they come from the Hub: what their own files say, as a spec."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from common.errors import FarmError, ModelUnsupportedError, SetupError
from config_db.detect import describe
from config_db.families import why_unsupported
from config_db.spec import ModelSpec


def spec_of_directory(path: Path, *, model_id: str | None = None) -> ModelSpec:
    """The spec of a local directory that holds a model of a family of this release.

    Width and length are what the files say; what they leave open stays open.

    Raises:
        SetupError: the directory holds no such model.
    """
    if not path.is_dir():
        raise SetupError(f"there is no model directory {path}")
    place = path.resolve()
    try:
        spec = describe(_Folder(place), model_id=model_id or place.name, source={"path": str(place)})
        reason = why_unsupported(spec)
        if reason is not None:
            raise ModelUnsupportedError(reason)
    except FarmError as error:
        raise SetupError(f"{path}: {error.message}") from error
    return spec


class _Folder:
    """The files of one directory (``config_db.detect.Files``)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> Collection[str]:
        """Those in it and in the directories in it."""
        found = (one for pattern in ("*", "*/*") for one in self._path.glob(pattern))
        return [one.relative_to(self._path).as_posix() for one in found if one.is_file()]

    def json(self, name: str) -> Any:
        """The content of a JSON file, None if there is none."""
        try:
            return json.loads((self._path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ModelUnsupportedError(f"its {name} is not JSON that can be read: {error}") from error
