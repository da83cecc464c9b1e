"""Alembic migrations of the config DB."""
