"""What the routes of the config DB answer with, as types."""

from typing import Any, Literal, TypedDict

from config_db.history import RowChange
from webapp.fleet import ProcessEpoch
from webapp.wire.results import ErrorBody


class Detail(TypedDict):
    """An error as tools for public config services read it. Some bring further fields."""

    error: str
    message: str


class ConfigProblem(TypedDict):
    """An error, twice, for two kinds of clients."""

    error: ErrorBody
    detail: Detail


class ModelEntry(TypedDict):
    """A model, its profiles, and how it came here."""

    model_id: str
    profiles: list[str]
    source: str


class ModelIndex(TypedDict):
    """All models, by name."""

    models: list[ModelEntry]


class EpochNamed(TypedDict):
    """The epoch after a write; ``changed`` is false if nothing had to be."""

    epoch: int
    epoch_id: str
    changed: bool


class ModelWritten(EpochNamed):
    """What a write of a model did."""

    model_id: str
    created_profiles: list[str]
    existing_profiles_skipped: list[str]
    warnings: list[str]
    routable_bundles_by_profile: dict[str, list[str]]
    router_id: str


class ModelDeleted(EpochNamed):
    """A model that is no more."""

    model_id: str
    deleted: Literal[True]


class RowNamed(TypedDict):
    """One row of the config DB."""

    kind: str
    name: str


class RolledBack(EpochNamed):
    """A new epoch with the contents of an old one."""

    rolled_back_to: int
    changes: list[RowNamed]


class EpochServed(TypedDict):
    """The epoch that one process serves, and which families its farm runs."""

    epoch: int
    bundles_hash: str
    epoch_id: str


class Convergence(TypedDict):
    """Who serves which epoch, and whether all serve the one that is wanted."""

    epoch: int
    epoch_id: str
    converged: bool
    config_db: Literal["connected", "away"]
    processes: list[ProcessEpoch]


class BundleStatus(TypedDict):
    """Which of the workers that may run a model have read it as it is now."""

    bundle_id: str
    expected_bundle_config_hash: str
    total_eligible_workers: int
    acked_workers: list[str]
    pending_workers: list[str]
    acked: bool


class ModelStatus(TypedDict):
    """Who has read a model as it is now, by bundle."""

    model_id: str
    config_epoch: int
    all_bundles_acked: bool
    no_bundles: bool
    bundles: list[BundleStatus]
    source: str


class ExportedModel(TypedDict):
    """One model as a document that can be written back, as JSON and as YAML."""

    model_id: str
    model_config: dict[str, Any]
    raw_yaml: str
    affected_bundles: list[str]


class Export(TypedDict):
    """Everything that is served, as of one epoch."""

    snapshot_version: int
    epoch: int
    generated_at: str
    models: list[ExportedModel]


Diff = TypedDict("Diff", {"from": int, "to": int, "changes": list[RowChange]})
Diff.__doc__ = "What differs between two epochs."


class Bundle(TypedDict):
    """What runs models: the families of this farm."""

    bundle_id: str
    priority: int
    adapter_count: int
    source: str
    connected_workers: int


class BundleList(TypedDict):
    """All bundles."""

    bundles: list[Bundle]


class BundleContent(TypedDict):
    """What is in a bundle."""

    name: str
    priority: int
    source: str
    adapters: list[str]


class Resolved(TypedDict):
    """Which model a name means, and what runs it; ``unsupported`` says why nothing does."""

    model: str
    resolved_bundle: str | None
    compatible_bundles: list[str]
    profiles: list[str]
    unsupported: str | None
