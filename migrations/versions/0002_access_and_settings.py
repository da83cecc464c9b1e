"""Pools, tenants, API keys, settings, idempotency keys; how each model came here."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

CONFIG_TABLES = ("pools", "tenants", "api_keys", "settings")


def upgrade() -> None:
    for name in CONFIG_TABLES:
        op.create_table(
            name,
            sa.Column("id", sa.String(), nullable=False),
            sa.Column("spec", postgresql.JSONB(), nullable=False),
            sa.Column("epoch", sa.BigInteger(), nullable=False),
            sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
            sa.PrimaryKeyConstraint("id", name=f"pk_{name}"),
        )
        op.create_index(f"ix_{name}_epoch", name, ["epoch"])
    op.create_table(
        "idempotency",
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("scope", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_at", "idempotency", ["at"])
    op.add_column("models", sa.Column("origin", sa.String(), server_default="filesystem", nullable=False))


def downgrade() -> None:
    op.drop_column("models", "origin")
    op.drop_table("idempotency")
    for name in CONFIG_TABLES:
        op.drop_table(name)
