"""The JSON Schema of a model's document, for editors and for whoever writes documents with a program."""

import json
from inspect import cleandoc
from typing import Any, Final

import msgspec

from config_db.families import FAMILIES
from config_db.field_meanings import MEANINGS
from config_db.spec import MAX_ID, MODEL_ID, ModelSpec

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def model_schema() -> dict[str, Any]:
    """What ``config_db.documents.read_model`` takes, as far as a schema can say it; each field is described."""
    schema = {"$schema": DIALECT, **msgspec.json.schema(ModelSpec)}
    describe(schema["$defs"])
    return schema


def describe(parts: dict[str, Any]) -> None:
    """Say of each field what it means, in the schemas of the parts of a model's document, by their names."""
    for struct, meanings in MEANINGS.items():
        part = parts[struct]
        part["description"] = cleandoc(part["description"])
        for field, meaning in meanings.items():
            part["properties"][field]["description"] = meaning
    fields = parts["ModelSpec"]["properties"]
    fields["id"] |= {"pattern": MODEL_ID, "maxLength": MAX_ID}  # only those of profiles hold a colon
    fields["family"]["examples"] = sorted(FAMILIES)


def schema_text() -> str:
    """The same as a file."""
    return json.dumps(model_schema(), indent=2) + "\n"
