"""The tables of the config DB: what is served, to whom, as of which epoch, and who changed it.

Every row that readers fetch carries the epoch it was last changed at, so that they ask only for newer ones; a deleted
row stays as a tombstone until readers have surely seen it.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, Identity, Index, LargeBinary, MetaData, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Kind = Literal["model", "pool", "tenant", "key", "setting"]
Origin = Literal["filesystem", "api", "auto"]

_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

TOMBSTONE_KEPT: Final = timedelta(days=30)
"""A reader that has not looked for as long reads everything again, since tombstones it needs may be gone."""


class Table(DeclarativeBase):
    """Base of all tables; names its constraints so that migrations can."""

    metadata = MetaData(naming_convention=_NAMES)


class FarmEpoch(Table):
    """The one row that every writer locks: the present epoch, and the first that the history still knows in full."""

    __tablename__ = "farm_epoch"
    __table_args__ = (CheckConstraint("only_one = 1", name="one_row"),)

    only_one: Mapped[int] = mapped_column(primary_key=True, default=1, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger)
    id: Mapped[UUID]
    history_from: Mapped[int] = mapped_column(BigInteger, server_default="0")


class EpochRow(Table):
    """Each epoch ever published: its random id tells a restored backup from the history it was cut from."""

    __tablename__ = "epochs"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    id: Mapped[UUID] = mapped_column(unique=True)
    actor: Mapped[str]
    reason: Mapped[str]
    raised_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class ConfigRow:
    """What rows of every kind have. ``spec`` is their content as JSON; ``deleted_at`` makes one a tombstone."""

    id: Mapped[str] = mapped_column(primary_key=True)
    spec: Mapped[dict[str, Any]] = mapped_column(JSONB)
    epoch: Mapped[int] = mapped_column(BigInteger, index=True)
    deleted_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class ModelRow(ConfigRow, Table):
    """One model; ``spec`` is a ``config_db.spec.ModelSpec``. ``origin`` says how it came here."""

    __tablename__ = "models"

    origin: Mapped[str] = mapped_column(server_default="filesystem")


class PoolRow(ConfigRow, Table):
    """Workers set aside under a name; ``spec`` is a ``config_db.access.PoolSpec``."""

    __tablename__ = "pools"


class TenantRow(ConfigRow, Table):
    """One tenant; ``spec`` is a ``config_db.access.TenantSpec``."""

    __tablename__ = "tenants"


class KeyRow(ConfigRow, Table):
    """One API key; ``spec`` is a ``config_db.access.KeySpec``, which holds a hash of the key and never the key."""

    __tablename__ = "api_keys"


class SettingRow(ConfigRow, Table):
    """One setting of the whole farm; ``id`` is its name, as ``catalog.allow``."""

    __tablename__ = "settings"


ROWS: Final[Mapping[Kind, type[ModelRow | PoolRow | TenantRow | KeyRow | SettingRow]]] = MappingProxyType(
    {"model": ModelRow, "pool": PoolRow, "tenant": TenantRow, "key": KeyRow, "setting": SettingRow}
)


class HistoryRow(Table):
    """One change of one row: what it was before and after, at which epoch."""

    __tablename__ = "history"
    __table_args__ = (Index("ix_history_kind_name", "kind", "name"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    epoch: Mapped[int] = mapped_column(BigInteger, ForeignKey("epochs.number"), index=True)
    kind: Mapped[str]
    name: Mapped[str]
    before: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    after: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))


class IdempotencyRow(Table):
    """The answer to a config write that named an idempotency key, so that the same write again is answered alike.

    ``scope`` is who wrote; ``request`` the SHA-256 of what was written. ``status`` and ``answer`` are the HTTP answer.
    """

    __tablename__ = "idempotency"

    scope: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[bytes] = mapped_column(LargeBinary)
    status: Mapped[int]
    answer: Mapped[bytes] = mapped_column(LargeBinary)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now(), index=True)
