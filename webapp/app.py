"""The Flask application: its parts put together. Nothing is connected before the first request."""

from typing import Final

from flask import Flask

from common.settings import WebSettings
from tasks.client import FarmClient
from webapp import config_store, problems
from webapp import farm as farms
from webapp.auth import door
from webapp.cluster import Cluster
from webapp.config_store import ConfigStore
from webapp.farm import Farm, Snapshots
from webapp.fleet import Fleet
from webapp.security_headers import SecurityHeaders
from webapp.views import (
    absent,
    cluster,
    config_bundles,
    config_epochs,
    configs,
    docs,
    encode,
    extract,
    health,
    models,
    oip,
    openai,
    pools,
    score,
    tasks,
)
from webapp.watchers import Watchers
from webapp.wire import raw_bodies

_VIEWS: Final = (
    encode,
    score,
    extract,
    openai,
    oip,
    tasks,
    models,
    pools,
    configs,
    config_epochs,
    config_bundles,
    cluster,
    absent,
    health,
    docs,
)


def create_app(settings: WebSettings, snapshots: Snapshots, client: FarmClient) -> Flask:
    """The application over a started snapshot reader and a client of the farm."""
    app = bare_app()
    app.config[raw_bodies.TIMEOUT] = settings.body_timeout_s
    farms.install(app.extensions, _farm(settings, snapshots, client))
    config_store.install(app.extensions, ConfigStore(settings.database_url))
    door.install(app, door.authenticator(settings, lambda: snapshots.current.keys))
    return app


def bare_app() -> Flask:
    """The routes alone, and how errors are answered: as much as the document of the API is made of."""
    app = Flask("webapp", static_folder=None)
    app.url_map.merge_slashes = False  # clients never follow redirects, and model ids may hold anything
    app.url_map.strict_slashes = False
    app.url_map.redirect_defaults = False
    problems.install(app)
    for view in _VIEWS:
        app.register_blueprint(view.bp)
    for further in (oip.probes, absent.openai_bp, cluster.sockets, docs.pages):
        app.register_blueprint(further)
    app.wsgi_app = SecurityHeaders(app.wsgi_app)  # type: ignore[method-assign]  # as Flask documents it
    return app


def _farm(settings: WebSettings, snapshots: Snapshots, client: FarmClient) -> Farm:
    """What the views reach for."""
    fleet = Fleet(client, grace_s=settings.worker_grace_s)
    sights = Cluster(
        fleet,
        client,
        lambda: snapshots.current,
        machine_profile=settings.machine_profile,
        extra_families=settings.family_places,
    )
    return Farm(settings, snapshots, client, fleet, sights, Watchers(settings.watchers))
