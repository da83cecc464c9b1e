"""The Celery worker: intake, scheduling, hosts and outcomes. Imports no torch: models run in ``workers.host``."""
