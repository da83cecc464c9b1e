"""What models were before they were changed or deleted: requests that were admitted then finish on it."""

from collections import OrderedDict
from typing import Final

from sqlalchemy import Connection, func, select

from common.logs import get_logger
from config_db.newer_rows import UNREADABLE
from config_db.rows import read_row
from config_db.schema import HistoryRow
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec

log = get_logger("config_db")

KEPT_SPECS: Final = 1024
KEPT_CHANGES: Final = 8
"""So many of the last ones stay known: ``KEPT_SPECS``, or those of so many changes of all that is served."""
_CHANGED: Final = (
    select(HistoryRow.name, HistoryRow.before)
    .where(HistoryRow.kind == "model", func.jsonb_typeof(HistoryRow.before) == "object")
    .order_by(HistoryRow.id.desc())
    .limit(KEPT_SPECS)
)
"""The last changes of models that were there before, the last one first."""


class FormerSpecs:
    """Owns the specs that no snapshot of a process holds any more, by their digests; the last to go are kept.

    Only the polling thread changes it; anyone may look.
    """

    def __init__(self) -> None:
        self._specs: OrderedDict[str, ModelSpec] = OrderedDict()

    def find(self, digest: str) -> ModelSpec | None:
        """The spec with this digest, of a model or of a profile, if it is among those that are kept."""
        return self._specs.get(digest)

    def recall(self, connection: Connection, present: Snapshot) -> None:
        """Learn from the history what models were before this process came.

        Args:
            connection: in the transaction in which ``present`` was read.
            present: what is served.
        """
        for name, before in reversed(connection.execute(_CHANGED).all()):
            try:
                self._keep(read_row(name, before), present)
            except UNREADABLE as error:
                log.info("former_spec_unreadable", model=name, error=str(error))
        self._forget(present.spec_count())

    def retire(self, held: Snapshot, fresh: Snapshot) -> None:
        """Keep the specs of a snapshot that the one which takes its place no longer has."""
        for name, model in held.models.items():
            if fresh.models.get(name) is not model:
                self._keep(model, fresh)
        self._forget(max(held.spec_count(), fresh.spec_count()))

    def _keep(self, model: ModelSpec, present: Snapshot) -> None:
        for spec in (model, *model.profile_specs):
            if present.by_digest(spec.digest) is None:
                self._specs[spec.digest] = spec
                self._specs.move_to_end(spec.digest)

    def _forget(self, served: int) -> None:
        most = max(KEPT_SPECS, KEPT_CHANGES * served)
        while len(self._specs) > most:
            self._specs.popitem(last=False)
