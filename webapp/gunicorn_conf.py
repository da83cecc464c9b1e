"""How gunicorn runs the web tier. The command line adds ``--bind``; settings say how many processes.

gevent: a request that waits costs a greenlet, so long polls and slow clients hold no process. What bounds clients
that misbehave: ``worker_connections`` bounds how many there are; ``keepalive`` also bounds how long the head of a
request may take; a slow body is cut off by ``webapp.wire.raw_bodies``; header sizes are bounded by the limits
below. An answer is at most some MiB and waits for a slow reader in a greenlet.
"""

from gevent import monkey

monkey.patch_all()  # before anything imports ssl, sockets or locks

from typing import Any

from common.collector import collect_seldom, keep_for_good
from common.errors import SetupError
from common.logs import get_logger
from common.settings import WebSettings, load_settings
from webapp.auth.door import check_settings

collect_seldom()
_settings = load_settings(WebSettings)


def on_starting(server: Any) -> None:
    """Ask before anything listens."""
    try:
        check_settings(_settings, [place[0] for place in server.cfg.address if isinstance(place, tuple)])
    except SetupError as error:
        get_logger("webapp").error("web_cannot_start", reason=error.message)
        raise SystemExit(1) from None


def post_worker_init(_worker: Any) -> None:
    """The application is there: nothing of it goes until the process does."""
    keep_for_good()


wsgi_app = "webapp.main:build()"
worker_class = "webapp.gunicorn_worker.FarmWebWorker"
workers = _settings.web_processes
worker_connections = 2000
backlog = 2048
keepalive = 75
timeout = 30
graceful_timeout = 8
limit_request_line = 8190
limit_request_fields = 100
limit_request_field_size = 16380
accesslog = None
errorlog = "-"
loglevel = "warning"
proc_name = "farmhand-web"
