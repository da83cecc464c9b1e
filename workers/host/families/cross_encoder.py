"""Cross-encoders: a query and an item read together by a transformer with one label, whose logit is the score.

Any folder that sentence-transformers' CrossEncoder loads with a sequence classifier. What outlives an eviction is the
tokenizer and a skeleton of the module.
"""

import copy
import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification

from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.dense_folder import refusal
from workers.host.families.kept_folders import Recent
from workers.host.families.pair_folder import (
    ACTIVATIONS,
    PairFolder,
    choose_dtype,
    expected_dtype,
    instruction_of,
    library_tokenizer,
    load_whole,
    measure_weights,
    read_pair_folder,
)
from workers.host.families.pairs import PairModel, Tokens
from workers.host.families.passes import pass_budget
from workers.host.families.protocol import Device
from workers.host.families.text_folder import longest_text
from workers.host.packing import Pass
from workers.host.skeletons import Skeletons, has_own_buffers, revive


@dataclass(frozen=True, slots=True)
class _Kept:
    """What outlives the eviction of a model: everything but its weights."""

    folder: PairFolder
    tokenizer: Tokenizer
    has_types: bool


class _PairReader:
    """Tokenises a query and an item as one pair, the longer of the two cut first."""

    def __init__(self, spec: ModelSpec, kept: _Kept) -> None:
        self._spec = spec
        self._folder = kept.folder
        self._tokenizer = kept.tokenizer

    def word(self, request: Request, query: str, texts: Sequence[str]) -> list[tuple[str, str]]:
        instruction = instruction_of(request, self._spec)
        query = (self._folder.prompt if instruction is None else instruction) + query
        if self._folder.lower_case:
            return [(query.lower(), text.lower()) for text in texts]
        return [(query, text) for text in texts]

    def tokenise(self, worded: Sequence[tuple[str, str]]) -> list[Tokens]:
        found = self._tokenizer.encode_batch_fast(list(worded))
        return [Tokens(one.ids or [0], one.type_ids or [0]) for one in found]


class _ClassifierRunner:
    """Runs a sequence classifier over padded pairs."""

    def __init__(self, module: torch.nn.Module, kept: _Kept, device: str, skeletons: Skeletons) -> None:
        self._module = module.to(device)
        self._device = device
        self._activation = ACTIVATIONS[kept.folder.activation]()
        self._pad_id = int(kept.folder.config.get("pad_token_id") or 0)
        self._has_types = kept.has_types and "token_type_ids" in inspect.signature(module.forward).parameters
        self._architecture = "" if has_own_buffers(module) else _architecture(kept.folder)
        self._skeletons = skeletons
        tensors = [*module.parameters(), *module.buffers()]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def score(self, rows: Sequence[Tokens], one: Pass) -> torch.Tensor:
        ids = np.full((len(rows), one.width), self._pad_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row.ids)] = row.ids
            types[place, : len(row.ids)] = row.types
            mask[place, : len(row.ids)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": types} if self._has_types else {})}
        given = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        logits: torch.Tensor = self._module(**given).logits
        found: torch.Tensor = self._activation(logits[:, 0].float())
        return found.cpu()

    @property
    def module(self) -> torch.nn.Module:
        return self._module

    def on(self, module: torch.nn.Module) -> "_ClassifierRunner":
        made = copy.copy(self)
        made._module = module  # noqa: SLF001 - its own kind
        return made

    def close(self) -> None:
        module, self._module = self._module, None  # type: ignore[assignment]  # a closed model runs no more
        self._skeletons.give_back(self._architecture, module)


class CrossEncoderFamily:
    """Loads cross-encoders, and remembers of each folder what it costs time to read."""

    def __init__(self) -> None:
        self._kept = Recent(_read)
        self._skeletons = Skeletons()

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """What the weights take in the number format that they will have on the device."""
        folder = read_pair_folder(files, spec)
        return measure_weights(folder, expected_dtype(spec, folder))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> PairModel:
        """Load the model of a folder."""
        kept = self._kept.recall(spec, files)
        dtype = choose_dtype(spec, kept.folder, device)
        module = self._revive(kept.folder, dtype)
        if module is None:
            module = load_whole(AutoModelForSequenceClassification, kept.folder, dtype)
        runner = _ClassifierRunner(module, kept, device.name, self._skeletons)
        return PairModel(spec, _PairReader(spec, kept), runner, pass_tokens=pass_budget(spec, device))

    def _revive(self, folder: PairFolder, dtype: torch.dtype) -> torch.nn.Module | None:
        """Hang the mapped weights into a kept skeleton; None where there is none or they do not fit."""
        module = self._skeletons.take(_architecture(folder))
        return None if module is None else revive(module, folder.transformer, dtype)


def _read(spec: ModelSpec, files: Path) -> _Kept:
    """A folder and its tokenizer, once checked to be one that this family runs rightly."""
    folder = read_pair_folder(files, spec)
    if folder.modules:
        kinds = ", ".join(kind for kind, _ in folder.modules)
        raise refusal(f"its modules {kinds} are none that the cross-encoder family runs")
    labels = folder.config.get("num_labels") or len(folder.config.get("id2label") or ("", ""))
    if labels != 1:
        raise refusal(f"it has {labels} labels, and a model that scores has one")
    made = library_tokenizer(folder)
    tokenizer: Tokenizer = made.backend_tokenizer
    longest = longest_text(folder.transformer, folder.max_length)
    if longest is not None:
        tokenizer.enable_truncation(longest, strategy="longest_first", direction=made.truncation_side)
    return _Kept(folder, tokenizer, has_types="token_type_ids" in made.model_input_names)


def _architecture(folder: PairFolder) -> str:
    """Equal for modules that differ in their weights alone."""
    return hashlib.sha256(msgspec.json.encode(folder.config, order="deterministic")).hexdigest()
