"""Zero-shot classes: models of the library gliclass, which read a text and all labels in one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.dense_folder import read_json, refusal
from workers.host.families.extraction import (
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
from workers.host.families.heads import check_covered, check_safetensors, load_fast_tokenizer, settle, weights_bytes
from workers.host.families.known_encoders import check_encoder, most_positions
from workers.host.families.protocol import Device

THRESHOLD: Final = 0.5
LONGEST: Final = 1024
"""Both the library's own."""
ARCHITECTURES: Final = ("uni-encoder", "decoder-kv")
"""Those that read text and labels in one sequence, and need nothing but their own folder."""


@dataclass(frozen=True, slots=True)
class _Ask:
    labels: tuple[str, ...]
    prompt: str | None
    multi_label: bool
    threshold: float


class Gliclass:
    """One loaded model. Texts with the same labels and prompt run together; where it pools padding, of equal length."""

    def __init__(self, spec: ModelSpec, pipeline: Any, device: Device) -> None:
        self._spec = spec
        self._pipeline = pipeline
        self._device = device.name
        config = pipeline.model.config
        self._has_special = config.architecture_type == "uni-encoder"
        # Every other pooling of the library takes padding in: texts then run with texts of their own length only.
        self._can_pad = self._has_special and config.pooling_strategy == "first"

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._pipeline.model
        return module

    def ask(self, request: Request, options: Options) -> _Ask:
        check_takes_no(self._spec, request, "output_schema")
        return _Ask(
            labels=check_labels(self._spec, request),
            prompt=request.instruction,
            multi_label=options.flag("multi_label", default=True),
            threshold=options.number("threshold", THRESHOLD),
        )

    def rows(self, text: str, ask: _Ask) -> list[Row]:
        """One row. A text that is too long is never cut: in many models the labels stand behind it."""
        tokens = self._count_tokens(text, ask)
        check_length(self._spec, tokens, self._pipeline.max_length, can_truncate=False)
        return [Row((text, ask), tokens, group=(ask.labels, ask.prompt, None if self._can_pad else tokens))]

    def collate(self, rows: Sequence[Row]) -> tuple[int, Any]:
        texts, ask = [row.inputs[0] for row in rows], rows[0].inputs[1]
        inputs = self._pipeline.prepare_inputs(texts, list(ask.labels), same_labels=True, prompt=ask.prompt)
        return len(ask.labels), inputs

    def run(self, batch: tuple[int, Any]) -> list[torch.Tensor]:
        classes, inputs = batch
        there = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        return list(self._pipeline.model(**there, max_num_classes=classes).logits.float().cpu())

    def found(self, text: str, ask: _Ask, rows: Sequence[Row], said: Sequence[torch.Tensor]) -> Found:  # noqa: ARG002
        """The labels over the threshold, or with ``multi_label`` false the one that fits best."""
        (logits,) = said
        check_finite(self._spec, logits[: len(ask.labels)])
        kind = "multi-label" if ask.multi_label else "single-label"
        chosen, _ = self._pipeline._postprocess_logits(logits, list(ask.labels), kind, ask.threshold)  # noqa: SLF001
        return Found(classifications=[{"label": one["label"], "score": one["score"]} for one in chosen])

    def _count_tokens(self, text: str, ask: _Ask) -> int:
        """Tokens of the sequence that the library is going to make."""
        sequence = self._pipeline.prepare_input(text, list(ask.labels), prompt=ask.prompt)
        return len(self._pipeline.tokenizer(sequence, add_special_tokens=self._has_special)["input_ids"])


class GliclassFamily:
    """Loads models of the library gliclass, which is imported with the first of them."""

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        return weights_bytes(spec, files)

    def load(self, spec: ModelSpec, files: Path, device: Device) -> ExtractModel:
        _check_folder(files)
        from gliclass import GLiClassModel, ZeroShotClassificationPipeline

        model, told = GLiClassModel.from_pretrained(
            files, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        check_covered(told["missing_keys"])
        longest = min(one for one in (spec.max_length, LONGEST, most_positions(model.config.encoder_config)) if one)
        # The library's pipeline takes the model to its own device, and its inputs: it stays in host memory.
        made = ZeroShotClassificationPipeline(
            model, load_fast_tokenizer(files), max_length=longest, device="cpu", progress_bar=False
        )
        settle(model, spec, device)
        extractor = Gliclass(spec, made.pipe, device)
        check_options(spec, extractor)
        return ExtractModel(spec, extractor, pass_tokens=device.pass_tokens)


def _check_folder(files: Path) -> None:
    check_safetensors(files)
    config = read_json(files / "config.json")
    if not isinstance(config, dict):
        raise refusal("it has no config.json")
    if config.get("architecture_type") not in ARCHITECTURES:
        raise refusal(f"its architecture {config.get('architecture_type')!r} is none of {', '.join(ARCHITECTURES)}")
    check_encoder(config.get("encoder_config"))
