"""Named entities by a label a token: transformers' token-classification models, words merged as its pipeline does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForTokenClassification, TokenClassificationPipeline
from transformers.pipelines.token_classification import AggregationStrategy

from common.errors import RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.extraction import (
    OVERFLOW_POLICIES,
    ExtractModel,
    Found,
    Options,
    Row,
    check_finite,
    check_length,
    check_options,
    check_takes_no,
    entity,
)
from workers.host.families.extraction_head import HeadExtractModel, HeadExtractor
from workers.host.families.heads import Head, load_head, weights_bytes
from workers.host.families.protocol import Device

STRATEGIES: Final = tuple(one.value for one in AggregationStrategy)
OUTSIDE: Final = "O"


@dataclass(frozen=True, slots=True)
class _Ask:
    labels: frozenset[str] | None
    strategy: str
    threshold: float
    truncate: bool
    stride: int | None


class TokenClassifier(HeadExtractor):
    """One loaded model; ``labels`` of a request keep the entities of these, without B- and I-."""

    def __init__(self, spec: ModelSpec, head: Head, device: Device) -> None:
        super().__init__(spec, head, device)
        self._pipeline: Any = TokenClassificationPipeline(  # type: ignore[no-untyped-call]  # transformers' own
            model=head.module, tokenizer=head.tokenizer, device=torch.device(device.name)
        )
        self._known = {label.split("-", 1)[-1] for label in head.module.config.id2label.values()} - {OUTSIDE}
        self._special = head.tokenizer.num_special_tokens_to_add()

    def ask(self, request: Request, options: Options) -> _Ask:
        check_takes_no(self._spec, request, "output_schema", "instruction")
        longest = self._head.longest
        return _Ask(
            labels=self._labels(request.labels),
            strategy=options.choice("aggregation_strategy", STRATEGIES, "simple"),
            threshold=options.number("threshold", 0.0),
            truncate=options.choice("overflow_policy", OVERFLOW_POLICIES, "error") == "truncate",
            stride=options.count("stride", below=None if longest is None else longest - self._special),
        )

    def rows(self, text: str, ask: _Ask) -> list[Row]:
        """One row, or with ``stride`` as many as the text needs, each overlapping the one before by so many tokens."""
        windows, longest = ask.stride is not None, self._head.longest
        cut = longest is not None and (windows or ask.truncate)
        encoded = self._head.tokenizer(
            text,
            truncation=cut,
            max_length=longest if cut else None,
            stride=ask.stride or 0,
            return_overflowing_tokens=windows and cut,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        parts = [encoded] if not (windows and cut) else _windows(encoded)
        check_length(self._spec, len(parts[0]["input_ids"]), longest)
        return [Row(part, len(part["input_ids"])) for part in parts]

    def found(self, text: str, ask: _Ask, rows: Sequence[Row], said: Sequence[torch.Tensor]) -> Found:
        """What the pipeline makes of the logits, cut back to the row's own tokens."""
        outputs = [_output(text, row, logits) for row, logits in zip(rows, said, strict=True)]
        for output in outputs:
            check_finite(self._spec, output["logits"])
        merged = self._pipeline.postprocess(outputs, aggregation_strategy=AggregationStrategy(ask.strategy))
        entities = []
        for one in merged:
            label = one.get("entity_group") or one["entity"]
            if one["score"] >= ask.threshold and (ask.labels is None or label.split("-", 1)[-1] in ask.labels):
                entities.append(entity(text, label, float(one["score"]), one["start"], one["end"]))
        return Found(entities=entities)

    def _labels(self, labels: list[str] | None) -> frozenset[str] | None:
        for place, label in enumerate(labels or ()):
            if label not in self._known:
                known = ", ".join(sorted(self._known)[:50])
                raise RequestError(f"{self._spec.id} knows {known}, not {label!r}", param=f"params.labels[{place}]")
        return frozenset(labels) if labels else None


class TokenClassificationFamily:
    """Loads token-classification models."""

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        return weights_bytes(spec, files)

    def load(self, spec: ModelSpec, files: Path, device: Device) -> ExtractModel:
        classifier = TokenClassifier(spec, load_head(AutoModelForTokenClassification, spec, files, device), device)
        check_options(spec, classifier)
        return HeadExtractModel(spec, classifier, pass_tokens=device.pass_tokens)


def _windows(encoded: Any) -> list[dict[str, list[Any]]]:
    """The overlapping parts of one text."""
    return [
        {name: values[at] for name, values in encoded.items() if name != "overflow_to_sample_mapping"}
        for at in range(len(encoded["input_ids"]))
    ]


def _output(text: str, row: Row, logits: torch.Tensor) -> dict[str, Any]:
    """What the pipeline's own forward would have given for one row."""
    return {
        "logits": logits[None, : row.tokens],
        "input_ids": torch.tensor(row.inputs["input_ids"])[None],
        "special_tokens_mask": torch.tensor(row.inputs["special_tokens_mask"])[None],
        "offset_mapping": torch.tensor(row.inputs["offset_mapping"])[None],
        "sentence": text,
    }
