"""What a process must know to find weights: places on disk, the bucket, bounds. No I/O, no torch."""

from typing import Final

import msgspec

from common.settings import WorkerSettings

PART_BYTES: Final = 32 << 20
CONNECTIONS: Final = 8


class WeightsSetup(msgspec.Struct, frozen=True, kw_only=True):
    """Where weights may come from and lie.

    ``model_dirs`` are the roots local models may lie under, ``hub_cache`` huggingface_hub's cache (None: its own
    default), ``directory`` the store of what is fetched (None: ``farmhand`` in the Hub cache). ``bucket`` and
    ``bucket_sources`` are ``s3://`` URIs. ``fill`` is the share of the disk above which the least recently used leave;
    ``max_bytes`` bounds the store itself. ``timeout_s`` bounds one fetch, ``silence_s`` what one answer may take.
    ``lease_s``: a holder of the cluster's lease that has not renewed it for so long is taken for dead.
    """

    model_dirs: tuple[str, ...] = ()
    hub_cache: str | None = None
    directory: str | None = None
    bucket: str | None = None
    bucket_endpoint: str | None = None
    bucket_sources: tuple[str, ...] = ()
    fill: float = 0.85
    max_bytes: int | None = None
    timeout_s: float = 540.0
    silence_s: float = 10.0
    lease_s: float = 30.0
    part_bytes: int = PART_BYTES
    connections: int = CONNECTIONS


def weights_setup(settings: WorkerSettings) -> WeightsSetup:
    """What the settings say."""
    return WeightsSetup(
        model_dirs=settings.model_roots,
        hub_cache=str(settings.hub_cache) if settings.hub_cache else None,
        directory=str(settings.weights_dir) if settings.weights_dir else None,
        bucket=settings.bucket or None,
        bucket_endpoint=settings.bucket_endpoint or None,
        bucket_sources=tuple(uri.strip() for uri in settings.bucket_sources.split(",") if uri.strip()),
        fill=settings.weights_fill,
        max_bytes=int(settings.weights_max_bytes) if settings.weights_max_bytes is not None else None,
        timeout_s=settings.weights_timeout_s,
    )
