"""Zero-shot named entities, and relations between them: models of the library gliner.

They mark spans or tokens, and read the labels with the text or with an encoder of their own. What relations to look for
stands in a request's ``output_schema``, as ``{"relations": ["lives in"]}``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import msgspec
import torch

from common.errors import RequestError
from config_db.encoders import encoders_named
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.dense_folder import read_json, refusal
from workers.host.families.extraction import (
    OVERFLOW_POLICIES,
    ExtractModel,
    Found,
    Options,
    Row,
    check_labels,
    check_length,
    check_options,
    check_takes_no,
    entity,
    not_finite,
)
from workers.host.families.heads import check_safetensors, settle, weights_bytes
from workers.host.families.known_encoders import check_encoder, encoder_folder, most_positions
from workers.host.families.protocol import Device

CONFIG: Final = "gliner_config.json"
THRESHOLD: Final = 0.5
"""The library's own."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """``prompt_tokens``: what labels and relations add to each text."""

    labels: tuple[str, ...]
    relations: tuple[str, ...]
    threshold: float
    relation_threshold: float
    flat_ner: bool
    multi_label: bool
    truncate: bool
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class _Words:
    """A text cut into words, and where they start and end in it."""

    ask: _Ask
    words: list[str]
    starts: list[int]
    ends: list[int]


class Gliner:
    """One loaded model. Texts of requests that ask the same run together."""

    def __init__(self, spec: ModelSpec, model: Any) -> None:
        self._spec = spec
        self._model = model
        self._collator = model.create_collator()
        self._tokenizer = model.data_processor.transformer_tokenizer
        self._longest = _longest(model)
        self._reads_labels = getattr(model.config, "labels_encoder", None) is None
        self._relates = getattr(model.config, "relations_layer", None) is not None

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._model.model
        return module

    def ask(self, request: Request, options: Options) -> _Ask:
        check_takes_no(self._spec, request, "instruction")
        labels, relations = check_labels(self._spec, request), self._relations(request)
        threshold = options.number("threshold", THRESHOLD)
        return _Ask(
            labels=labels,
            relations=relations,
            threshold=threshold,
            relation_threshold=options.number("relation_threshold", threshold),
            flat_ner=options.flag("flat_ner", default=True),
            multi_label=options.flag("multi_label", default=False),
            truncate=options.choice("overflow_policy", OVERFLOW_POLICIES, "error") == "truncate",
            prompt_tokens=self._count_prompt((*labels, *relations)),
        )

    def rows(self, text: str, ask: _Ask) -> list[Row]:
        """One row; none for a blank text, in which there is nothing to find."""
        if not text.strip():
            return []
        (words,), (starts,), (ends,) = self._model.prepare_inputs([text])
        if not ask.truncate:
            check_length(self._spec, len(words), self._model.config.max_len, unit="words")
        kept = words[: self._model.config.max_len]
        tokens = self._count_tokens(kept) + ask.prompt_tokens
        if not ask.truncate:
            check_length(self._spec, tokens, self._longest)
        return [Row(_Words(ask, kept, starts, ends), tokens, group=ask)]

    def collate(self, rows: Sequence[Row]) -> tuple[_Ask, dict[str, Any]]:
        inputs = self._model.prepare_base_input([row.inputs.words for row in rows])
        ask = rows[0].inputs.ask
        further = {"relation_types": list(ask.relations)} if self._relates else {}
        return ask, self._model.collate_batch(inputs, list(ask.labels), self._collator, **further)

    def run(self, batch: tuple[_Ask, dict[str, Any]]) -> list[Any]:
        """The spans, and relations, that the library's decoder takes from each text; None for numbers not finite."""
        ask, inputs = batch
        output = self._model.run_batch(inputs, threshold=ask.threshold)
        finite = torch.isfinite(output[0]).flatten(1).all(dim=1).tolist()
        decoding = {"threshold": ask.threshold, "flat_ner": ask.flat_ner, "multi_label": ask.multi_label}
        if self._relates:
            decoding["relation_threshold"] = ask.relation_threshold
        decoded = self._model.decode_batch(output, inputs, **decoding)
        spans, relations = decoded if self._relates else (decoded, [[]] * len(decoded))
        return [one if good else None for *one, good in zip(spans, relations, finite, strict=True)]

    def found(self, text: str, ask: _Ask, rows: Sequence[Row], said: Sequence[Any]) -> Found:  # noqa: ARG002
        if not rows:
            return Found()
        if said[0] is None:
            raise not_finite(self._spec)
        spans, relations = said[0]
        there = {
            "valid_texts": [text],
            "valid_to_orig_idx": [0],
            "start_token_map": [rows[0].inputs.starts],
            "end_token_map": [rows[0].inputs.ends],
            "num_original": 1,
        }
        (placed,) = self._model.map_entities_to_text([spans], **there)
        (related,) = self._model.map_relations_to_text([relations], [spans], **there) if self._relates else ([],)
        return Found(
            entities=[entity(text, one["label"], one["score"], one["start"], one["end"]) for one in placed],
            relations=[
                {
                    "head": one["head"]["text"],
                    "tail": one["tail"]["text"],
                    "relation": one["relation"],
                    "score": one["score"],
                }
                for one in related
            ],
        )

    def _relations(self, request: Request) -> tuple[str, ...]:
        """The relations that a request asks for."""
        if not self._relates:
            check_takes_no(self._spec, request, "output_schema")
        schema = request.output_schema or {}
        named = schema.get("relations", [])
        if schema.keys() - {"relations"} or not _are_names(named):
            message = f"{self._spec.id} takes an output_schema of relations, as {{'relations': ['lives in']}}"
            raise RequestError(message, param="params.output_schema")
        return tuple(dict.fromkeys(named))

    def _count_prompt(self, labels: Sequence[str]) -> int:
        """Tokens of a row that are not its text: its ends, and the labels, each with a mark, where they stand in it."""
        ends = int(self._tokenizer.num_special_tokens_to_add())
        return ends + (self._count_tokens(labels) + len(labels) + 2 if self._reads_labels else 0)

    def _count_tokens(self, words: Sequence[str]) -> int:
        return len(self._tokenizer(list(words), is_split_into_words=True, add_special_tokens=False)["input_ids"])


class GlinerFamily:
    """Loads models of the library gliner, which is imported with the first of them."""

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        return weights_bytes(spec, files)

    def load(self, spec: ModelSpec, files: Path, device: Device) -> ExtractModel:
        check_safetensors(files, spec.trust.formats)
        config = _check_folder(files)
        from gliner import GLiNER

        with _whole(files, config) as folder:
            model = GLiNER.from_pretrained(
                str(folder),
                local_files_only=True,
                map_location="cpu",
                strict=True,
                max_length=spec.max_length,
                resize_token_embeddings=config.get("labels_encoder") is None,
            )
        model.model = settle(model.model, spec, device)
        model.eval()
        extractor = Gliner(spec, model)
        check_options(spec, extractor)
        return ExtractModel(spec, extractor, pass_tokens=device.pass_tokens)


def _check_folder(files: Path) -> dict[str, Any]:
    """Its config; a refusal unless its files, and those of the encoders it names, need no code of their own."""
    config = read_json(files / CONFIG)
    if not isinstance(config, dict):
        raise refusal("it has no gliner_config.json")
    if config.get("labels_decoder") is not None:
        raise refusal("its gliner_config.json has a labels_decoder, and only models of given labels are run")
    check_encoder(config.get("encoder_config") or _named_config(files, config.get("model_name")))
    if config.get("labels_encoder") is not None:
        check_encoder(config.get("labels_encoder_config") or _named_config(files, config["labels_encoder"]))
    return config


def _named_config(files: Path, repository: Any) -> Any:
    return read_json(encoder_folder(files, repository) / "config.json")


@contextmanager
def _whole(files: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The folder as the library reads it without asking for anything else: encoders that it names are directories."""
    named = {name: encoder_folder(files, config[name]) for name in encoders_named(config, _names(files))}
    if not named:
        yield files
        return
    with TemporaryDirectory(prefix="gliner-") as place:
        whole = Path(place)
        for path in files.iterdir():
            (whole / path.name).symlink_to(path)
        (whole / CONFIG).unlink()
        there = {name: str(path) for name, path in named.items()}
        (whole / CONFIG).write_bytes(msgspec.json.encode({**config, **there}))
        yield whole


def _names(files: Path) -> set[str]:
    return {path.relative_to(files).as_posix() for pattern in ("*", "*/*") for path in files.glob(pattern)}


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)


def _longest(model: Any) -> int | None:
    """The most tokens of labels and text together: beyond, the library's tokenizer cuts without a word.

    How many words a text may have is another bound, ``max_len`` of its config or ``max_length`` of the spec.
    """
    positions = most_positions(model.model.token_rep_layer.bert_layer.model.config)
    known = (model.data_processor.transformer_tokenizer.model_max_length, positions)
    return min((one for one in known if one), default=None)
