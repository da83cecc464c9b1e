"""Zero-shot classes by entailment: each label, put into a hypothesis, is judged against the text by an NLI model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForSequenceClassification

from common.errors import InputTooLongError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.dense_folder import refusal
from workers.host.families.extraction import (
    OVERFLOW_POLICIES,
    ExtractModel,
    Found,
    Options,
    Row,
    check_finite,
    check_labels,
    check_length,
    check_options,
    check_takes_no,
)
from workers.host.families.extraction_head import HeadExtractModel, HeadExtractor
from workers.host.families.heads import Head, load_head, weights_bytes
from workers.host.families.protocol import Device

SLOT: Final = "{}"
TEMPLATE: Final = "This example is {}."


@dataclass(frozen=True, slots=True)
class _Ask:
    labels: tuple[str, ...]
    hypotheses: tuple[str, ...]
    multi_label: bool
    threshold: float
    truncate: bool


class EntailmentClassifier(HeadExtractor):
    """One loaded model: a row is the pair of a text and one hypothesis."""

    def __init__(self, spec: ModelSpec, head: Head, device: Device) -> None:
        super().__init__(spec, head, device)
        self._entailment = _entailment(head.module.config.label2id)
        self._contradiction = -1 if self._entailment == 0 else 0  # as transformers' own pipeline takes them

    def ask(self, request: Request, options: Options) -> _Ask:
        check_takes_no(self._spec, request, "output_schema", "instruction")
        labels = check_labels(self._spec, request)
        template = options.text("hypothesis_template", TEMPLATE)
        if SLOT not in template:
            raise options.wrong("hypothesis_template", "holds {}, where the label goes")
        hypotheses = [template.replace(SLOT, label) for label in labels]
        self._check_room(hypotheses)
        return _Ask(
            labels=labels,
            hypotheses=tuple(hypotheses),
            multi_label=options.flag("multi_label", default=False),
            threshold=options.number("threshold", 0.0),
            truncate=options.choice("overflow_policy", OVERFLOW_POLICIES, "error") == "truncate",
        )

    def rows(self, text: str, ask: _Ask) -> list[Row]:
        longest = self._head.longest
        cut = longest is not None and ask.truncate
        encoded = self._head.tokenizer(
            [text] * len(ask.hypotheses),
            list(ask.hypotheses),
            truncation="only_first" if cut else False,
            max_length=longest if cut else None,
        )
        rows = [{name: values[at] for name, values in encoded.items()} for at in range(len(ask.hypotheses))]
        check_length(self._spec, max(len(row["input_ids"]) for row in rows), longest)
        return [Row(row, len(row["input_ids"])) for row in rows]

    def found(self, text: str, ask: _Ask, rows: Sequence[Row], said: Sequence[torch.Tensor]) -> Found:  # noqa: ARG002
        """Labels with their probabilities, the likeliest first: each on its own, or one among all."""
        logits = torch.stack(list(said))
        check_finite(self._spec, logits)
        if ask.multi_label or len(ask.labels) == 1:
            scores = logits[:, [self._contradiction, self._entailment]].softmax(dim=-1)[:, 1]
        else:
            scores = logits[:, self._entailment].softmax(dim=-1)
        ranked = sorted(zip(ask.labels, scores.tolist(), strict=True), key=lambda one: -one[1])
        return Found(
            classifications=[{"label": label, "score": score} for label, score in ranked if not score < ask.threshold]
        )

    def _check_room(self, hypotheses: list[str]) -> None:
        """InputTooLongError if a hypothesis leaves no room for a text."""
        encoded = self._head.tokenizer(hypotheses, add_special_tokens=False)["input_ids"]
        longest = max(map(len, encoded)) + self._head.tokenizer.num_special_tokens_to_add(pair=True)
        if self._head.longest is not None and longest >= self._head.longest:
            raise InputTooLongError(f"a label leaves no room for a text in {self._spec.id}", param="params.labels")


class NliFamily:
    """Loads NLI models."""

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        return weights_bytes(spec, files)

    def load(self, spec: ModelSpec, files: Path, device: Device) -> ExtractModel:
        head = load_head(AutoModelForSequenceClassification, spec, files, device)
        classifier = EntailmentClassifier(spec, head, device)
        check_options(spec, classifier)
        return HeadExtractModel(spec, classifier, pass_tokens=device.pass_tokens)


def _entailment(labels: dict[str, Any]) -> int:
    """Which of the model's classes says that the text entails the hypothesis."""
    for label, place in labels.items():
        if label.lower().startswith("entail"):
            return int(place)
    raise refusal(f"none of its classes is called entailment; its config.json says {', '.join(labels)}")
