"""What a load wants of a source: which files, in which formats, and the encoders that lie in other repositories.

Two loads that want different files of one source never share a folder: what one may read, the other may not.
"""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from config_db.spec import Source, WeightsFormat
from workers.weights.manifest import ENCODERS, SAFE, RemoteFile
from workers.weights.parts import Remote
from workers.weights.store import bucket_place, hub_place

_SHORT: Final = 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """A source, and the formats that its spec trusts weights in."""

    source: Source
    formats: tuple[WeightsFormat, ...] = SAFE

    @property
    def repository(self) -> str:
        """Its name on the Hub."""
        return str(self.source.hub)

    @property
    def revision(self) -> str:
        """The commit, branch or tag."""
        return self.source.revision or "main"

    @property
    def is_plain(self) -> bool:
        """Whether it is one repository as it is."""
        return not self.source.encoders

    def place(self, commit: str) -> str:
        """Where a commit of the repository lies in the store."""
        return hub_place(self.repository, f"{commit}{self._variant()}")

    def folder(self, commit: str) -> str:
        """Where it lies in the farm's bucket."""
        return f"hub/{self.repository}/{commit}{self._variant()}/"

    def bucket_place(self) -> str:
        """Where the folder of a bucket lies in the store."""
        return bucket_place(f"{self.source.bucket}{self._variant()}")

    def _variant(self) -> str:
        """Nothing for safetensors alone; else what tells these files from others of the same commit."""
        trusted = "-pickle" if "pickle" in self.formats else ""
        if not self.source.encoders:
            return trusted
        told = msgspec.json.encode(self.source.encoders)
        return f"{trusted}-with-{hashlib.sha256(told).hexdigest()[:_SHORT]}"


class Joined:
    """A remote with encoders of other repositories: their files lie under ``encoders/<repository>/``."""

    def __init__(self, main: Remote, encoders: Mapping[str, Remote]) -> None:
        self.name = main.name
        self._main = main
        self._encoders = {f"{ENCODERS}/{repository}/": remote for repository, remote in encoders.items()}

    def files(self, own: Sequence[RemoteFile], theirs: Mapping[str, Sequence[RemoteFile]]) -> tuple[RemoteFile, ...]:
        """All of them by the names that they get; what the model's own repository has in their place is left out."""
        found = [one for one in own if not one.name.startswith(tuple(self._encoders))]
        for repository, files in theirs.items():
            found += [msgspec.structs.replace(one, name=f"{ENCODERS}/{repository}/{one.name}") for one in files]
        return tuple(found)

    def read(self, file: RemoteFile, start: int, stop: int) -> Generator[bytes]:
        """The bytes of a file from ``start`` to ``stop``, from where it lies."""
        for prefix, remote in self._encoders.items():
            if file.name.startswith(prefix):
                own = msgspec.structs.replace(file, name=file.name.removeprefix(prefix))
                return remote.read(own, start, stop)
        return self._main.read(file, start, stop)
