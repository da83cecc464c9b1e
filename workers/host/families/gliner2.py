"""Entities, relations, classes and structures by a schema: models of the library gliner2, of both its architectures.

A request names ``labels``, which are entity types, or an ``output_schema`` in the library's own form: ``entities``,
``relations``, ``classifications`` and ``structures``. What structures hold is answered under ``data``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError

from common.errors import RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.dense_folder import read_json
from workers.host.families.extraction import (
    ExtractModel,
    Found,
    Options,
    Row,
    check_length,
    check_options,
    check_takes_no,
    entity,
    not_finite,
)
from workers.host.families.heads import check_safetensors, settle, weights_bytes
from workers.host.families.known_encoders import check_encoder, most_positions
from workers.host.families.protocol import Device

THRESHOLD: Final = 0.5
"""The library's own."""
_ENTITY_FIELDS: Final = frozenset({"text", "confidence", "start", "end"})


@dataclass(frozen=True, slots=True)
class _Ask:
    """``schema`` and ``meaning``: the request's schema as the library reads it; ``threshold``: of spans."""

    schema: Mapping[str, Any]
    meaning: Mapping[str, Any]
    threshold: float


class Gliner2:
    """One loaded model. Texts with the same threshold run together, each with its own schema."""

    def __init__(self, spec: ModelSpec, model: Any, device: Device) -> None:
        self._spec = spec
        self._model = model
        self._device = device.name
        known = (spec.max_length, most_positions(model.encoder.config))
        self._longest = min((one for one in known if one), default=None)

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._model
        return module

    def ask(self, request: Request, options: Options) -> _Ask:
        check_takes_no(self._spec, request, "instruction")
        ((schema,), (meaning,)) = self._model._build_schema_dicts_and_metadata([self._schema(request)])  # noqa: SLF001
        return _Ask(schema, meaning, options.number("threshold", THRESHOLD))

    def rows(self, text: str, ask: _Ask) -> list[Row]:
        """One row; none for a blank text, in which there is nothing to find."""
        if not text.strip():
            return []
        tokens = len(self._model.processor.transform_record(text, ask.schema).input_ids)
        check_length(self._spec, tokens, self._longest, can_truncate=False)
        return [Row((text, ask), tokens, group=ask.threshold)]

    def collate(self, rows: Sequence[Row]) -> Any:
        asks = [row.inputs[1] for row in rows]
        pairs = [(row.inputs[0], row.inputs[1].schema) for row in rows]
        batch = self._model.processor.collate_fn_inference(
            pairs, error_policy="raise", architecture=self._model.architecture
        )
        return batch, asks

    def run(self, batch: Any) -> list[Any]:
        """What the library extracts from each text, with scores and places; None where the numbers are not finite."""
        inputs, asks = batch
        there = inputs.to(torch.device(self._device))
        states = self._model.encode_tokens(there)
        rows = [row[mask.bool()] for row, mask in zip(states, there.attention_mask, strict=True)]
        said = self._model._extract_from_batch(  # noqa: SLF001 - batch_extract tokenises and runs in one
            there, asks[0].threshold, [dict(ask.meaning) for ask in asks], True, True, hidden_states=rows
        )
        return [one if torch.isfinite(row).all() else None for one, row in zip(said, rows, strict=True)]

    def found(self, text: str, ask: _Ask, rows: Sequence[Row], said: Sequence[Any]) -> Found:
        """What the library formats for its own callers, as ours read it."""
        if not rows:
            return Found()
        if said[0] is None:
            raise not_finite(self._spec)
        tasks = ask.meaning["classification_tasks"]
        told = self._model.format_results(said[0], True, ask.meaning["relation_order"], tasks)
        entities = told.pop("entities", None) or {}
        relations = told.pop("relation_extraction", None) or {}
        return Found(
            entities=list(_entities(text, entities)),
            relations=list(_relations(text, relations)),
            classifications=[
                {"label": one["label"], "score": one["confidence"], "task": task}
                for task in tasks
                for one in _several(told.get(task))
            ],
            data=_within(text, told) or None,
        )

    def _schema(self, request: Request) -> Any:
        """The library's form of what a request looks for."""
        labels, schema = request.labels, dict(request.output_schema or {})
        if not labels and not schema:
            raise RequestError(
                f"{self._spec.id} needs labels or an output_schema: say what to look for", param="params"
            )
        if labels and "entities" in schema:
            raise RequestError("entities are named in labels or in output_schema, not in both", param="params.labels")
        if labels:
            schema["entities"] = labels
        try:
            return self._model.create_schema().from_dict(schema)
        except ValidationError as error:
            raise _wrong_schema(error) from error
        except ValueError as error:
            raise RequestError(f"output_schema cannot be used: {error}", param="params.output_schema") from error


class Gliner2Family:
    """Loads models of the library gliner2, which is imported with the first of them."""

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        return weights_bytes(spec, files)

    def load(self, spec: ModelSpec, files: Path, device: Device) -> ExtractModel:
        check_safetensors(files)
        check_encoder(read_json(files / "encoder_config" / "config.json"))
        from gliner2 import AutoExtractor

        model = settle(AutoExtractor.from_pretrained(str(files), map_location="cpu"), spec, device)
        model.processor.change_mode(is_training=False)
        extractor = Gliner2(spec, model, device)
        check_options(spec, extractor)
        return ExtractModel(spec, extractor, pass_tokens=device.pass_tokens)


def _entities(text: str, told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for label, several in told.items():
        for one in _several(several):
            place = _place(text, one)
            if place is not None:
                yield {**entity(text, label, one["confidence"], *place), **_attributes(one)}


def _relations(text: str, told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Relations by the texts of their ends; a relation is as sure as the less sure of them."""
    for relation, several in told.items():
        for one in several:
            head, tail = _place(text, one["head"]), _place(text, one["tail"])
            if head is not None and tail is not None:
                yield {
                    "head": text[slice(*head)],
                    "tail": text[slice(*tail)],
                    "relation": relation,
                    "score": min(one["head"]["confidence"], one["tail"]["confidence"]),
                }


def _several(told: Any) -> list[Any]:
    """The library gives one thing, several, or nothing where it was asked for one."""
    if isinstance(told, list):
        return told
    return [told] if told else []


def _place(text: str, one: Mapping[str, Any]) -> tuple[int, int] | None:
    """Where a span stands; None in the full stop that the library puts after a text that ends without one."""
    start, end = one["start"], min(one["end"], len(text))
    return (start, end) if start < end else None


def _within(text: str, told: Any) -> Any:
    """The same, with every span inside the text; None for a span that is not."""
    if isinstance(told, list):
        return [one for one in (_within(text, one) for one in told) if one is not None]
    if not isinstance(told, dict):
        return told
    if "start" in told and "end" in told:
        place = _place(text, told)
        return None if place is None else {**told, "text": text[slice(*place)], "start": place[0], "end": place[1]}
    return {name: _within(text, one) for name, one in told.items()}


def _attributes(one: Mapping[str, Any]) -> dict[str, Any]:
    """What a schema's ``entity_attributes`` add to an entity."""
    return {name: value for name, value in one.items() if name not in _ENTITY_FIELDS}


def _wrong_schema(error: ValidationError) -> RequestError:
    """The first thing that is wrong with a schema, with its path."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(map(str, first["loc"]))
    where = f"params.output_schema.{path}"[:200] if path else "params.output_schema"
    return RequestError(f"output_schema is wrong: {first['msg']}", param=where)
