"""A directory of YAML files as what the config DB is to say: models, and pools, tenants and settings beside them.

A file is one model, or holds some of the sections ``models`` (a list), ``pools``, ``tenants`` and ``settings`` (each by
name). API keys are never in files. Files and folders whose name begins with a dot are left alone.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from common.errors import ConfigError, FarmError, SetupError
from config_db import auto, retention
from config_db.access import PoolNamed, PoolSpec, TenantNamed, TenantSpec
from config_db.documents import convert, parse, read_model
from config_db.field_paths import joined
from config_db.file_faults import Fault, all_faults
from config_db.owners import LEASED
from config_db.publish import Put
from config_db.schema import Kind
from config_db.spec import ModelSpec, plain

SUFFIXES: Final = (".yaml", ".yml")
MAX_FILE_BYTES: Final = 16 << 20
SECTIONS: Final[Mapping[str, Kind]] = {"models": "model", "pools": "pool", "tenants": "tenant", "settings": "setting"}
STAMPED: Final = "created_at"
"""Set by the farm when a pool is made; no file says it."""
SETTINGS: Final[Mapping[str, type[msgspec.Struct]]] = {auto.SETTING: auto.Allow, retention.SETTING: retention.Keep}
"""What the settings that this release reads hold; another one may read others."""
_SETTING_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")


class ConfigFiles(msgspec.Struct):
    """What the files say. ``spoken_of``: the kinds that some file has a section for; only those can be pruned."""

    specs: list[ModelSpec] = msgspec.field(default_factory=list)
    puts: list[Put] = msgspec.field(default_factory=list)
    spoken_of: set[Kind] = msgspec.field(default_factory=set)
    faults: list[Fault] = msgspec.field(default_factory=list)
    files: list[Path] = msgspec.field(default_factory=list)


def read_files(directory: Path, *, families: Collection[str] = ()) -> ConfigFiles:
    """Read every YAML file of a directory and of those in it, in the order of their paths, past all faults.

    Args:
        directory: where the files are.
        families: names of the operator's own families besides the built-in ones.

    Raises:
        SetupError: there is no such directory.
    """
    if directory.is_file():
        raise SetupError(f"{directory} is a file: name the directory it is in")
    if not directory.is_dir():
        raise SetupError(f"there is no catalogue directory {directory}")
    reading = _Reading(families)
    for path in _yaml_files(directory):
        reading.read(path, str(path.relative_to(directory)))
    reading.check_names()
    return reading.found


class _Reading:
    """Owns what has been found so far, and where."""

    def __init__(self, families: Collection[str]) -> None:
        self.found = ConfigFiles()
        self._families = families
        self._places: dict[tuple[Kind, str], str] = {}

    def read(self, path: Path, shown: str) -> None:
        self.found.files.append(path)
        try:
            content = parse(path.read_bytes(), max_bytes=MAX_FILE_BYTES)
        except OSError as error:
            self._blame(shown, SetupError(f"this file cannot be read: {error.strerror}"))
            return
        except FarmError as error:
            self._blame(shown, error)
            return
        if isinstance(content, dict) and "id" not in content and not SECTIONS.keys().isdisjoint(content):
            self._read_sections(shown, content)
        else:
            self._read_model(shown, content, at="")

    def check_names(self) -> None:
        """An alias is nobody else's name."""
        owners = {spec.id: spec.id for spec in self.found.specs}
        for spec in self.found.specs:
            for alias in spec.aliases:
                owner = owners.setdefault(alias, spec.id)
                if owner != spec.id:
                    message = f"model {spec.id}: the alias {alias!r} is a name of model {owner}, too"
                    self._blame(self._places["model", spec.id], ConfigError(message, param="aliases"))

    def _read_sections(self, shown: str, content: Mapping[str, Any]) -> None:
        for section, parts in content.items():
            kind = SECTIONS.get(section)
            if kind is None:
                message = f"there is no section `{section[:100]}`; there are {', '.join(SECTIONS)}"
                self._blame(shown, ConfigError(message, param=section))
            elif kind == "model" and not isinstance(parts, list):
                self._blame(shown, ConfigError("models: this is a list of models", param=section))
            elif kind != "model" and not isinstance(parts, dict):
                self._blame(shown, ConfigError(f"{section}: this is a mapping of names", param=section))
            else:
                self.found.spoken_of.add(kind)
                for place, part in enumerate(parts):
                    if kind == "model":
                        self._read_model(shown, part, at=f"models[{place}]")
                    else:
                        self._read_part(shown, kind, part, parts[part], at=f"{section}.{part}")

    def _read_model(self, shown: str, document: Any, *, at: str) -> None:
        read = partial(read_model, families=self._families)
        try:
            spec = read(document)
        except FarmError:
            for fault in all_faults(document, read):
                self._blame(shown, fault, at=at)
            return
        if self._is_new(shown, "model", spec.id):
            self.found.specs.append(spec)
            self.found.puts.append(Put("model", spec.id, plain(spec), "filesystem"))

    def _read_part(self, shown: str, kind: Kind, name: str, document: Any, *, at: str) -> None:
        read = partial(_READERS[kind], name)
        try:
            content = read(document)
        except FarmError:
            for fault in all_faults(document, read):
                self._blame(shown, fault, at=at)
            return
        if self._is_new(shown, kind, name):
            self.found.puts.append(Put(kind, name, content))

    def _is_new(self, shown: str, kind: Kind, name: str) -> bool:
        other = self._places.setdefault((kind, name), shown)
        if other is not shown:
            self._blame(shown, ConfigError(f"{kind} {name} stands in {other}, too"))
        return other is shown

    def _blame(self, shown: str, error: FarmError, *, at: str = "") -> None:
        param = joined(at, error.param or "") or None
        is_placed = error.param is not None and error.message.startswith(error.param)
        message = joined(at, error.message) if is_placed or not at else f"{param}: {error.message}"
        self.found.faults.append(Fault(shown, message, param))


def _yaml_files(directory: Path) -> Iterator[Path]:
    for path in sorted(path for path in directory.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        if not any(part.startswith(".") for part in path.relative_to(directory).parts):
            yield path


def _read_pool(name: str, document: Any) -> dict[str, Any]:
    convert({"name": name}, PoolNamed)
    spec = convert(document, PoolSpec)
    for field in (*LEASED, STAMPED):
        if getattr(spec, field) is not None:
            raise ConfigError(f"{field}: a pool in files is permanent and says none", param=field)
    return plain(spec)


def _read_tenant(name: str, document: Any) -> dict[str, Any]:
    convert({"name": name}, TenantNamed)
    return plain(convert({} if document is None else document, TenantSpec))


def _read_setting(name: str, document: Any) -> dict[str, Any]:
    if not _SETTING_NAME.fullmatch(name):
        raise ConfigError("this is no name of a setting")
    if not isinstance(document, dict):
        raise ConfigError("a setting is a mapping of fields")
    if name in SETTINGS:  # whoever reads it makes do without one that is broken, and says so in a log only
        convert(document, SETTINGS[name])
    return document


_READERS: Final[Mapping[Kind, Callable[[str, Any], dict[str, Any]]]] = {
    "pool": _read_pool,
    "tenant": _read_tenant,
    "setting": _read_setting,
}
