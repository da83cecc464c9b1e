"""What alembic runs: on the connection that ``config_db.migrate`` hands it, or offline to print SQL."""

from alembic import context

from config_db.schema import Table

connection = context.config.attributes.get("connection")
if connection is None:
    context.configure(dialect_name="postgresql", target_metadata=Table.metadata, literal_binds=True)
else:
    # each migration in a transaction of its own: the locks of two together could cross those of processes at work
    context.configure(connection=connection, target_metadata=Table.metadata, transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
