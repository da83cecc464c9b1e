"""What the routes about models answer with, as types."""

from typing import Any, Literal, TypedDict

from config_db.spec import Input, Output


class LastError(TypedDict):
    """Why a model cannot be served, in the form of an error that was met when loading."""

    code: str
    message: str
    attempts: int
    permanent: bool


class ModelInfo(TypedDict):
    """A model, or one of its profiles as a model of its own, and whether it is loaded now."""

    name: str
    inputs: list[Input]
    outputs: list[Output]
    dims: dict[str, int]
    loaded: bool
    state: Literal["available", "loaded", "unsupported"]
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
