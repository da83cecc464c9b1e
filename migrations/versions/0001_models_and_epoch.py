"""Models, the epoch and the history of changes."""

import uuid

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    now = sa.text("now()")
    farm_epoch = op.create_table(
        "farm_epoch",
        sa.Column("only_one", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.CheckConstraint("only_one = 1", name="ck_farm_epoch_one_row"),
        sa.PrimaryKeyConstraint("only_one", name="pk_farm_epoch"),
    )
    epochs = op.create_table(
        "epochs",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("raised_at", sa.DateTime(timezone=True), server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_epochs"),
        sa.UniqueConstraint("id", name="uq_epochs_id"),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("spec", postgresql.JSONB(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
    )
    op.create_index("ix_models_epoch", "models", ["epoch"])
    op.create_table(
        "history",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("before", postgresql.JSONB(), nullable=True),
        sa.Column("after", postgresql.JSONB(), nullable=True),
        sa.ForeignKeyConstraint(["epoch"], ["epochs.number"], name="fk_history_epoch_epochs"),
        sa.PrimaryKeyConstraint("id", name="pk_history"),
    )
    op.create_index("ix_history_epoch", "history", ["epoch"])
    op.create_index("ix_history_kind_name", "history", ["kind", "name"])
    first = uuid.uuid4()
    op.bulk_insert(epochs, [{"number": 1, "id": first, "actor": "farmhand", "reason": "the empty farm"}])
    op.bulk_insert(farm_epoch, [{"only_one": 1, "number": 1, "id": first}])


def downgrade() -> None:
    for table in ("history", "models", "epochs", "farm_epoch"):
        op.drop_table(table)
