"""What the routes about models answer with, as types."""

from typing import Any, Literal, TypedDict

from config_db.spec import Input, Output


class LastError(TypedDict):
    """How the last load of a model failed, or, in the same form, why it is never tried."""

    code: str
    message: str
    attempts: int
    permanent: bool


class ModelInfo(TypedDict):
    """A model, or one of its profiles as a model of its own, and what has become of it."""

    name: str
    inputs: list[Input]
    outputs: list[Output]
    dims: dict[str, int]
    loaded: bool
    state: Literal["available", "loading", "loaded", "failed", "unsupported"]
    last_error: LastError | None
    max_sequence_length: int | None
    profiles: dict[str, Any]
    revision: str | None
    capabilities: None
    aliases: list[str]


class ListedModel(TypedDict):
    """A model as clients of the OpenAI routes read it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelCard(ModelInfo, ListedModel):
    """One model, for both kinds of clients at once."""


class ModelList(TypedDict):
    """All models, twice, for two kinds of clients."""

    models: list[ModelInfo]
    object: Literal["list"]
    data: list[ListedModel]
