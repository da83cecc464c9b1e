"""Logging: constant events with fields, as key=value on a terminal and JSON elsewhere (structlog)."""

import logging
import sys
from typing import cast

import structlog


def configure_logs(*, level: str = "INFO", json_lines: bool | None = None) -> None:
    """Route structlog and the standard library's loggers to stderr at ``level``."""
    as_json = (not sys.stderr.isatty()) if json_lines is None else json_lines
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def get_logger(room: str) -> structlog.typing.FilteringBoundLogger:
    """A logger that names its room in every event."""
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger(room=room))
