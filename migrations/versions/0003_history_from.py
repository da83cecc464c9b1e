"""Where the history begins: what is older was purged."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    column = sa.Column("history_from", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    op.add_column("farm_epoch", column)


def downgrade() -> None:
    op.drop_column("farm_epoch", "history_from")
