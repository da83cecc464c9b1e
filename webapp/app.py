"""The Flask application: its parts put together. Nothing is connected before the first request."""

from flask import Flask

from common.settings import WebSettings
from tasks.client import FarmClient
from webapp import config_store, problems
from webapp import farm as farms
from webapp.auth import door
from webapp.config_store import ConfigStore
from webapp.farm import Farm, Snapshots
from webapp.fleet import Fleet
from webapp.security_headers import SecurityHeaders
from webapp.views import (
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


def create_app(settings: WebSettings, snapshots: Snapshots, client: FarmClient) -> Flask:
    """The application over a started snapshot reader and a client of the farm."""
    app = bare_app()
    farms.install(app.extensions, Farm(settings, snapshots, client, Fleet(client)))
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
    for view in (
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
        health,
        docs,
    ):
        app.register_blueprint(view.bp)
    app.register_blueprint(oip.probes)
    app.register_blueprint(docs.pages)
    app.wsgi_app = SecurityHeaders(app.wsgi_app)  # type: ignore[method-assign]  # as Flask documents it
    return app
