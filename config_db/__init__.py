"""What is served, where, by whom, at which epoch: schema, epochs, catalogue, snapshot (SQLAlchemy, Postgres)."""
