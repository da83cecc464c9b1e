"""Settings, read once at the edge of each process; inside, frozen objects are handed on.

What is served is no setting: that is the config DB. A misspelt ``FARMHAND_`` variable is refused by ``refuse_unknown``.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ByteSize, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from common.errors import SetupError

_PREFIX = "FARMHAND_"
S = TypeVar("S", bound="CommonSettings")


class CommonSettings(BaseSettings):
    """What every process needs."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="ignore")

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="the one logical Redis database of the farm")
    database_url: str = Field("postgresql://127.0.0.1/farmhand", description="the config DB")
    transport: Literal["farm", "redis"] = Field("farm", description="farm: batch pop; redis: kombu's own, the fallback")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    state_dir: Path = Field(Path(".farmhand"), description="where snapshots and caches are kept across restarts")
    events: bool = Field(True, description="send Celery events; Flower shows tasks only with them")
    config_poll_s: float = Field(2.0, gt=0, description="how often the config epoch is polled")
    pool: str = Field("default", pattern=r"^[a-z0-9][a-z0-9-]*$")
    machine_profile: str = Field("cpu", pattern=r"^[a-z0-9][a-z0-9-]*$")
    result_ttl_s: int = Field(3600, gt=0, description="how long asynchronous results are kept")
    object_store: str = Field(
        "",
        pattern=r"^(s3://[^/\s]+(/\S*)?)?$",
        description="for bodies and results over 8 MiB, as s3://name/prefix; empty: they stay in Redis",
    )
    object_store_endpoint: str = Field("", description="URL of an S3-compatible server; empty: as boto3 is configured")
    extra_families: str = Field("", description="further families, as name=module:Class, comma-separated")
    model_dirs: str = Field("", description="colon-separated roots under which local model directories are allowed")
    fault: str = Field("", description="tests only: name of the fault point at which this process kills itself")

    @property
    def model_roots(self) -> tuple[str, ...]:
        """The roots under which local models are allowed, one by one."""
        return tuple(root for root in self.model_dirs.split(":") if root)

    @property
    def family_places(self) -> dict[str, str]:
        """The further families: where their code is, as ``module:Class``, by name."""
        pairs = (entry.partition("=") for entry in self.extra_families.split(",") if entry.strip())
        return {name.strip(): place.strip() for name, _, place in pairs}


class WebSettings(CommonSettings):
    """What the web process needs besides."""

    max_body_bytes: ByteSize = Field(ByteSize(34 * 2**20), description="larger request bodies are refused with 413")
    max_item_text_bytes: ByteSize = Field(ByteSize(2 * 2**20), description="longer texts are refused with 400")
    max_items: int = Field(4096, gt=0, description="items one request may hold unless the model says less")
    fetch_images: bool = Field(False, description="whether images may be named by public http(s) addresses")
    queue_limit: int = Field(50_000, gt=0, description="messages a queue may hold before 503 QUEUE_FULL")
    tenant_queue_limit: int = Field(
        256, gt=0, description="open requests of one tenant in one lane unless its quotas say, if there are several"
    )
    sync_timeout_s: float = Field(120.0, gt=0, description="deadline of a synchronous request by default")
    body_timeout_s: float = Field(300.0, gt=0, description="how long a request's body may take to arrive")
    web_processes: int = Field(1, gt=0, description="gunicorn processes; one serves some thousand requests a second")
    async_timeout_s: float = Field(3600.0, gt=0, description="deadline of an asynchronous request by default")
    worker_grace_s: float = Field(
        30.0, ge=0, description="how long requests still wait for a worker whose queue was served until just now"
    )
    worker_start_s: float = Field(
        60.0, gt=0, description="what callers are told that a worker takes to start, until a start was measured"
    )
    watchers: int = Field(100, ge=0, description="WebSockets of /ws/cluster-status that one web process serves at once")
    auth: Literal["none", "static", "keys", "oidc"] = Field(
        "none", description="who may call; none: everyone, and only this machine's own addresses are listened on"
    )
    auth_open: bool = Field(False, description="ask for no key though other networks reach the API")
    auth_tokens: SecretStr = Field(SecretStr(""), description="static: tokens that may do inference, comma-separated")
    auth_tokens_file: Path | None = Field(None, description="static: further ones, one a line")
    auth_admin_tokens: SecretStr = Field(SecretStr(""), description="static: tokens that may do everything")
    auth_admin_tokens_file: Path | None = Field(None, description="static: further ones, one a line")
    oidc_issuer: str = Field("", description="oidc: the issuer of tokens, as https://login.example.org/realm")
    oidc_audience: str = Field("", description="oidc: what tokens must be meant for")
    oidc_jwks_url: str = Field("", description="oidc: where the issuer's keys are; empty: as its configuration says")
    oidc_tenant_claim: str = Field(
        "tenant", description="oidc: the claim that names the tenant; empty: the default one"
    )


class WorkerSettings(CommonSettings):
    """What the Celery worker and its hosts need besides."""

    hosts: int = Field(0, ge=0, description="model processes; 0: one per device, or one per core on CPU")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    workers_here: int = Field(1, gt=0, description="workers of this machine, which share its devices and cores")
    worker_number: int = Field(1, gt=0, description="which of them this one is, from 1")
    device_memory: ByteSize | None = Field(
        None, description="bytes models may hold on the device, as 4GiB; unset: measured"
    )
    host_memory: ByteSize | None = Field(
        None, description="bytes of weights a host of a GPU keeps in host memory, as 16GiB; unset: a quarter of it"
    )
    copies_limit: ByteSize = Field(
        ByteSize(16 * 2**30), description="bytes of converted weights kept in the state directory; 0: none are kept"
    )
    host_growth: ByteSize = Field(
        ByteSize(2 * 2**30), description="a host whose memory grows by more that nothing explains is replaced; 0: never"
    )
    device_fraction: float = Field(0.85, gt=0, le=1, description="share of the measured memory that models may hold")
    hub_cache: Path | None = Field(None, description="huggingface_hub's cache, read before asking; unset: its default")
    weights_dir: Path | None = Field(
        None, description="where fetched weights are kept; unset: the directory farmhand in the Hub cache"
    )
    weights_fill: float = Field(
        0.85, gt=0, le=1, description="share of that disk above which the least recently used weights are removed"
    )
    weights_max_bytes: ByteSize | None = Field(
        None, description="bytes fetched weights may take, as 200GiB; unset: as many as the disk holds"
    )
    weights_timeout_s: float = Field(
        540.0, gt=0, description="how long one fetch may take; the next goes on from there"
    )
    bucket: str = Field(
        "", pattern=r"^(s3://[^/\s]+(/\S*)?)?$", description="between the disk and the Hub, as s3://name/prefix"
    )
    bucket_endpoint: str = Field("", description="URL of an S3-compatible server; empty: as boto3 is configured")
    bucket_sources: str = Field("", description="further s3:// URIs that models may lie under, comma-separated")
    preload_families: str = Field("dense", description="families imported before hosts start, comma-separated")
    torch_threads: int = Field(1, gt=0, description="threads of one host's forward pass on CPU")
    cuda_visible_devices: str | None = Field(None, validation_alias="CUDA_VISIBLE_DEVICES")
    intake_max_messages: int = Field(
        512, gt=0, description="messages a worker holds; more fills batches, less leaves work to others"
    )
    intake_max_items: int = Field(8192, gt=0)
    intake_max_tokens: int = Field(1_000_000, gt=0)
    pop_max: int = Field(64, gt=0, le=1000, description="messages taken in one round trip")
    batch_max_items: int = Field(256, gt=0, description="items in one micro-batch")
    batch_max_tokens: int = Field(0, ge=0, description="tokens in one micro-batch; 0: 2048 on CPU, 16384 on a GPU")
    hang_floor_s: float = Field(5.0, gt=0, description="a measured batch is never cut earlier than this")
    hang_unmeasured_s: float = Field(60.0, gt=0, description="a batch of a model not yet measured is cut after this")
    drain_s: float = Field(7.0, ge=0, description="how long shutdown waits for running batches")


def load_settings(kind: type[S], **overrides: Any) -> S:
    """Read and check the environment once; SetupError names every bad variable in one line."""
    refuse_unknown(os.environ)
    try:
        return kind(**overrides)
    except ValidationError as error:
        bad = "; ".join(f"{_PREFIX}{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise SetupError(f"settings refused: {bad}") from error


def refuse_unknown(environ: Iterable[str]) -> None:
    """Raise SetupError for ``FARMHAND_`` variables that no settings class knows: pydantic-settings ignores them."""
    kinds = (CommonSettings, WebSettings, WorkerSettings)
    known = {n.upper() for kind in kinds for n, field in kind.model_fields.items() if field.validation_alias is None}
    unknown = sorted(n for n in environ if n.startswith(_PREFIX) and n.removeprefix(_PREFIX) not in known)
    if unknown:
        raise SetupError(f"unknown settings: {', '.join(unknown)}; see docs/settings.md for the names")
