"""Causal language models that rank: asked whether an item answers a query, they are scored by the word they would say.

The score is the probability of the model's word for yes against its word for no, at the last position. A folder of
sentence-transformers' CrossEncoder (a LogitScore module and a chat template with the roles ``query`` and ``document``)
says all of that itself; any other is asked as Qwen3-Reranker is, with the words and texts that its spec names.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from common.errors import RequestError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.families.dense_folder import read_json, refusal
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
from workers.host.families.pairs import PairModel, Reader, Tokens
from workers.host.families.protocol import Device
from workers.host.families.text_folder import longest_text
from workers.host.packing import Pass

PREFIX: Final = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX: Final = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QUERY: Final = "<Instruct>: {instruction}\n<Query>: {text}\n"
DOCUMENT: Final = "<Document>: {text}"
MOST_ENDS: Final = 256
_FORWARD_TAKES: Final = frozenset({"position_ids", "logits_to_keep", "use_cache"})
INSTRUCTION: Final = "Given a web search query, retrieve relevant passages that answer the query"
"""What Qwen3-Reranker was trained with; also what its page asks for where a caller names no instruction."""


@dataclass(frozen=True, slots=True)
class _Words:
    """Token ids of the words that the score is made of; without ``no`` it is the logit of ``yes`` alone."""

    yes: int
    no: int | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """What outlives the eviction of a model: everything but its weights."""

    folder: PairFolder
    reader: Reader
    words: _Words


class _PromptReader:
    """Puts a pair between a fixed beginning and end; what is too long loses the end of its item."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, longest: int | None) -> None:
        self._spec = spec
        self._query = spec.templates.get("query", QUERY)
        self._document = spec.templates.get("document", DOCUMENT)
        self._before = _ids(tokenizer, _option(spec, "prefix", PREFIX))
        self._after = _ids(tokenizer, _option(spec, "suffix", SUFFIX))
        self._tokenizer = tokenizer
        if longest is not None:
            room = longest - len(self._before) - len(self._after)
            if room < 1:
                raise refusal(f"its length of {longest} tokens leaves no room for a text within its prompt")
            tokenizer.enable_truncation(room)

    def word(self, request: Request, query: str, texts: Sequence[str]) -> list[str]:
        named = instruction_of(request, self._spec)
        if named is not None and "{instruction}" not in self._query + self._document:
            raise RequestError(f"{self._spec.id} takes no instruction", param="instruction")
        instruction = named or INSTRUCTION
        asked = _fill(self._query, text=query, instruction=instruction)
        return [asked + _fill(self._document, text=text, instruction=instruction) for text in texts]

    def tokenise(self, worded: Sequence[str]) -> list[Tokens]:
        found = self._tokenizer.encode_batch_fast(list(worded), add_special_tokens=False)
        return [Tokens([*self._before, *one.ids, *self._after], []) for one in found]


class _ChatReader:
    """Words a pair by the folder's chat template; what is too long keeps the end that the template gives it."""

    def __init__(self, spec: ModelSpec, folder: PairFolder, made: Any, longest: int | None) -> None:
        self._spec = spec
        self._folder = folder
        self._template = made
        self._tokenizer: Tokenizer = made.backend_tokenizer
        self._longest = longest
        settings = read_json(folder.transformer / "sentence_bert_config.json") or {}
        self._options = (settings.get("processing_kwargs") or {}).get("chat_template") or {}
        said = ((settings.get("modality_config") or {}).get("message") or {}).get("format")
        self._has_parts = said == "structured"
        if not made.chat_template:
            raise refusal("it has no chat template to word its pairs by")
        probe = self._render("", "the query", "the document")
        if "the query" not in probe or "the document" not in probe:
            raise refusal("its chat template leaves out what the roles query and document say")
        self._ends: dict[str, list[int]] = {}

    def word(self, request: Request, query: str, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
        instruction = instruction_of(request, self._spec) or self._folder.prompt
        end = self._end(instruction)
        return [(self._render(instruction, query, text), end) for text in texts]

    def tokenise(self, worded: Sequence[tuple[str, list[int]]]) -> list[Tokens]:
        found = self._tokenizer.encode_batch_fast([text for text, _ in worded], add_special_tokens=False)
        return [Tokens(self._cut(one.ids, end), []) for one, (_, end) in zip(found, worded, strict=True)]

    def _cut(self, ids: list[int], end: list[int]) -> list[int]:
        if self._longest is None or len(ids) <= self._longest:
            return ids
        return [*ids[: self._longest - len(end)], *end]

    def _end(self, instruction: str) -> list[int]:
        """The tokens that follow an item whatever it says: what two renderings end in alike."""
        known = self._ends.get(instruction)
        if known is None:
            one, other = (_ids(self._tokenizer, self._render(instruction, text, text)) for text in ("0", "1 2 3 4"))
            alike = zip(reversed(one), reversed(other), strict=False)
            count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], alike))
            if self._longest is not None and count >= self._longest:
                message = (
                    f"the instruction leaves no room for a text within the {self._longest} tokens of {self._spec.id}"
                )
                raise RequestError(message, param="instruction")
            if len(self._ends) >= MOST_ENDS:  # callers choose the instructions
                self._ends.clear()
            known = self._ends[instruction] = one[len(one) - count :]
        return known

    def _render(self, instruction: str, query: str, text: str) -> str:
        said = [("query", query), ("document", text)]
        if instruction:
            said.insert(0, ("system", instruction))
        messages = [{"role": role, "content": self._content(one)} for role, one in said]
        rendered: str = self._template.apply_chat_template(messages, tokenize=False, **self._options)
        return rendered

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self._has_parts else text


class _CausalRunner:
    """Runs a causal language model over pairs that are padded on the left, so that all end together."""

    def __init__(self, module: torch.nn.Module, kept: _Kept, device: str) -> None:
        self._module = module.to(device)
        self._device = device
        self._words = kept.words
        self._activation = ACTIVATIONS[kept.folder.activation]()
        self._pad_id = int(kept.folder.config.get("pad_token_id") or 0)
        tensors = {id(one): one for one in (*module.parameters(), *module.buffers())}.values()
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def score(self, rows: Sequence[Tokens], one: Pass) -> torch.Tensor:
        ids = np.full((len(rows), one.width), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, one.width - len(row.ids) :] = row.ids
            mask[place, one.width - len(row.ids) :] = 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        logits = self._module(**given, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        found: torch.Tensor = logits[:, self._words.yes]
        if self._words.no is not None:
            found = found - logits[:, self._words.no]
        return self._activation(found).cpu()  # type: ignore[no-any-return]  # a module of torch.nn

    @property
    def module(self) -> torch.nn.Module:
        return self._module

    def on(self, module: torch.nn.Module) -> "_CausalRunner":
        made = copy.copy(self)
        made._module = module  # noqa: SLF001 - its own kind
        return made

    def close(self) -> None:
        self._module = None  # type: ignore[assignment]  # a closed model runs no more


class CausalRerankerFamily:
    """Loads causal rerankers, and remembers of each folder what it costs time to read."""

    def __init__(self) -> None:
        self._kept = Recent(_read)

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """What the weights take in the number format that they will have on the device."""
        folder = read_pair_folder(files, spec)
        return measure_weights(folder, expected_dtype(spec, folder))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> PairModel:
        """Load the model of a folder."""
        kept = self._kept.recall(spec, files)
        module = load_whole(AutoModelForCausalLM, kept.folder, choose_dtype(spec, kept.folder, device))
        lacking = _FORWARD_TAKES - inspect.signature(module.forward).parameters.keys()
        if lacking:
            raise refusal(f"its architecture {type(module).__name__} does not take {', '.join(sorted(lacking))}")
        budget = min(spec.limits.max_batch_tokens or device.pass_tokens, device.pass_tokens)
        return PairModel(spec, kept.reader, _CausalRunner(module, kept, device.name), pass_tokens=budget)


def _read(spec: ModelSpec, files: Path) -> _Kept:
    """A folder, how its pairs are worded, and by which words it is scored."""
    folder = read_pair_folder(files, spec)
    made = library_tokenizer(folder)
    if made.truncation_side != "right":
        raise refusal("its tokenizer cuts texts at their beginning, which the causal-reranker family does not do")
    tokenizer: Tokenizer = made.backend_tokenizer
    longest = longest_text(folder.transformer, folder.max_length)
    match folder.modules:
        case ():
            words = _Words(_word_id(tokenizer, spec, "yes_token"), _word_id(tokenizer, spec, "no_token"))
            return _Kept(folder, _PromptReader(spec, tokenizer, longest), words)
        case (("LogitScore", settings),):
            return _Kept(folder, _ChatReader(spec, folder, made, longest), _words_of(settings))
        case modules:
            kinds = ", ".join(kind for kind, _ in modules)
            raise refusal(f"its modules {kinds} are none that the causal-reranker family runs")


def _words_of(settings: Mapping[str, Any]) -> _Words:
    yes, no = settings.get("true_token_id"), settings.get("false_token_id")
    if not isinstance(yes, int) or not isinstance(no, int | None):
        raise refusal("its LogitScore module names no tokens")
    return _Words(yes, no)


def _word_id(tokenizer: Tokenizer, spec: ModelSpec, option: str) -> int:
    """The id of a word that the spec names; a folder that does not say how it is asked is not guessed at."""
    word = spec.options.get(option)
    if not isinstance(word, str):
        raise refusal(f"neither its files nor its spec (options.{option}) say by which words it is scored")
    found = tokenizer.token_to_id(word)
    if found is None:
        raise refusal(f"its tokenizer has no token {word!r} (options.{option})")
    return found


def _option(spec: ModelSpec, name: str, default: str) -> str:
    wanted = spec.options.get(name, default)
    if not isinstance(wanted, str):
        raise refusal(f"options.{name} of its spec is no text")
    return wanted


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _fill(template: str, *, text: str, instruction: str) -> str:
    """The template with both; a text that spells a slot stays as it is."""
    return text.join(part.replace("{instruction}", instruction) for part in template.split("{text}"))
