"""Tiny models that score pairs, of the real architectures, and what their libraries say of ``PAIRS``.

Both are made in a process of their own, which knows nothing of Farmhand; what is said of a folder stands beside it.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from tasks.messages import Request

if TYPE_CHECKING:  # what makes folders need not wait for torch
    from workers.host.families.pairs import PairModel

LONGEST = 48
"""Tokens of a pair; a letter is a token."""


def _letters(count: int, start: int = 0) -> str:
    """A text of so many tokens: words of up to four letters."""
    text = [chr(ord("a") + (start + place * place) % 26) for place in range(count)]
    return " ".join("".join(text[at : at + 4]) for at in range(0, count, 4))


_EDGES = [
    (query, item)
    for total in (LONGEST - 5, LONGEST - 4, LONGEST - 3, LONGEST - 2, LONGEST - 1, LONGEST)
    for query, item in ((8, total - 8), (total - 8, 8), (total // 2, total - total // 2))
]
"""Tokens of query and item round the length at which one of them is cut, by 3 or 4 tokens that stand round them."""
PAIRS: list[tuple[str, str]] = [
    ("a farm", "cows and hens"),
    ("", "an item without a query"),
    ("a query without an item", ""),
    ("", ""),
    *((_letters(query, 1), _letters(item, 2)) for query, item in _EDGES),
    (_letters(200, 3), "short"),
    ("short", _letters(200, 4)),
    (_letters(200, 5), _letters(199, 6)),
    (_letters(199, 7), _letters(200, 8)),
    (_letters(24, 9), _letters(200, 10)),
    *((f"query {n}", _letters(3 * n + 1, n)) for n in range(12)),
]

_TOKENIZER = """
import json, sys
import numpy as np
import torch, transformers
from sentence_transformers import CrossEncoder
from tokenizers import AddedToken, Tokenizer, models as tm, normalizers, pre_tokenizers, processors
out, pairs, longest = sys.argv[1], [tuple(one) for one in json.load(open(sys.argv[2]))], int(sys.argv[3])
letters = [chr(c) for c in range(33, 127)]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + one for one in letters)]
def tokenizer(pair, extra=(), **settings):
    piece = tm.WordPiece({w: n for n, w in enumerate([*words, *extra])}, unk_token="[UNK]",
        max_input_chars_per_word=50)
    made = Tokenizer(piece)
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if pair:
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair,
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    made.add_special_tokens([AddedToken(one, normalized=False) for one in extra if one.startswith("<|")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", **settings)
"""

_CROSS_ENCODERS = (
    _TOKENIZER
    + """
tiny = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    pad_token_id=0, num_labels=1)
small = dict(tiny, max_position_embeddings=64, initializer_range=0.5)
configs = {
    "bert": lambda: transformers.BertConfig(**small),
    "bert-untyped": lambda: transformers.BertConfig(**small),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**small, type_vocab_size=1),
    "electra": lambda: transformers.ElectraConfig(**small, embedding_size=32),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=len(words), dim=32, n_layers=2, n_heads=4,
        hidden_dim=64, max_position_embeddings=64, initializer_range=0.5, num_labels=1),
    "mpnet": lambda: transformers.MPNetConfig(**small),
    "deberta": lambda: transformers.DebertaV2Config(**small, relative_attention=True, position_buckets=16,
        pos_att_type=["p2c", "c2p"], type_vocab_size=0, pooler_hidden_size=32),
    "modernbert-cls": lambda: transformers.ModernBertConfig(**tiny, cls_token_id=2, sep_token_id=3, local_attention=8,
        initializer_range=0.5, classifier_pooling="cls"),
    "modernbert-mean": lambda: transformers.ModernBertConfig(**tiny, cls_token_id=2, sep_token_id=3, local_attention=8,
        initializer_range=0.5, classifier_pooling="mean"),
}
typed = tokenizer("[CLS] $A [SEP] $B:1 [SEP]:1", model_max_length=longest,
    model_input_names=["input_ids", "token_type_ids", "attention_mask"])
untyped = tokenizer("[CLS] $A [SEP] $B:1 [SEP]:1", model_max_length=longest)
plain = tokenizer("[CLS] $A [SEP] [SEP] $B [SEP]", model_max_length=longest)
for seed, (kind, config) in enumerate(configs.items()):
    torch.manual_seed(seed)
    here = f"{out}/{kind}"
    transformers.AutoModelForSequenceClassification.from_config(config()).save_pretrained(here + "/plain")
    tokenizers = {"xlm-roberta": plain, "mpnet": plain, "bert-untyped": untyped}
    tokenizers.get(kind, typed).save_pretrained(here + "/plain")
    CrossEncoder(here + "/plain", device="cpu", activation_fn=torch.nn.Identity(), prompts={"ask": "ask : "},
        default_prompt_name="ask").save(here + "/st")
    for part in ("plain", "st"):
        model = CrossEncoder(f"{here}/{part}", device="cpu", model_kwargs={"dtype": "float32"})
        np.save(f"{here}/{part}.npy", model.predict(pairs, batch_size=8))
    told = CrossEncoder(here + "/plain", device="cpu").predict(pairs, batch_size=8, prompt="please : ")
    np.save(f"{here}/instructed.npy", told)
"""
)


_CAUSAL_RERANKERS = (
    _TOKENIZER
    + r"""
import re
PREFIX = ("<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    "provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n")
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TASK = "Given a web search query, retrieve relevant passages that answer the query"
spoken = sorted({one for text in (PREFIX, SUFFIX, TASK) for one in re.findall(r"[a-z]{2,}", text.lower())})
extra = ["<|im_start|>", "<|im_end|>", *(one for one in spoken if one not in ("yes", "no")), "yes", "no"]
made = tokenizer(None, extra)
before, after = (made.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX))
asked = made.encode(f"<Instruct>: {TASK}\n<Query>: <Document>: ", add_special_tokens=False)
most = len(before) + len(after) + len(asked) + longest
fast = tokenizer(None, extra, model_max_length=most)
tiny = dict(vocab_size=len(words) + len(extra), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=64, pad_token_id=0, max_position_embeddings=512, initializer_range=0.5,
    tie_word_embeddings=True)
configs = {
    "qwen3": lambda: transformers.Qwen3Config(**tiny, head_dim=8),
    "llama": lambda: transformers.LlamaConfig(**dict(tiny, tie_word_embeddings=False)),
}

def as_its_page_says(folder, task):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    texts = [f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {text}" for query, text in pairs]
    rows = tokenizer(texts, padding=False, truncation="longest_first", return_attention_mask=False,
        add_special_tokens=False, max_length=most - len(before) - len(after))
    rows["input_ids"] = [before + row + after for row in rows["input_ids"]]
    inputs = tokenizer.pad({"input_ids": rows["input_ids"]}, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1, :]
    both = torch.stack([logits[:, no], logits[:, yes]], dim=1)
    return torch.nn.functional.log_softmax(both, dim=1)[:, 1].exp().numpy()

CHAT = '''{%- for message in messages if message["role"] == "system" -%}
<|im_start|>{{ message["content"] }}<|im_end|>
{%- endfor -%}
{%- for message in messages if message["role"] == "query" -%}
<|im_start|>query {{ message["content"] }}<|im_end|>
{%- endfor -%}
{%- for message in messages if message["role"] == "document" -%}
<|im_start|>document {{ message["content"] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant:{%- endif -%}'''
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

def as_cross_encoder(plain, folder, no):
    chat = Transformer(plain, transformer_task="text-generation", processor_kwargs={"chat_template": CHAT,
        "model_max_length": longest}, model_kwargs={"dtype": "float32"},
        processing_kwargs={"chat_template": {"add_generation_prompt": True}})
    words = [chat.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    score = LogitScore(true_token_id=words[0], false_token_id=words[1] if no else None)
    activation = torch.nn.Sigmoid() if no else torch.nn.Identity()
    CrossEncoder(modules=[chat, score], device="cpu", activation_fn=activation).save(folder)
    model = CrossEncoder(folder, device="cpu", model_kwargs={"dtype": "float32"})
    np.save(folder + ".npy", model.predict(pairs, batch_size=8))
    np.save(folder + "-instructed.npy", model.predict(pairs, batch_size=8, prompt="rate it"))

for seed, (kind, config) in enumerate(configs.items()):
    torch.manual_seed(seed)
    here = f"{out}/{kind}"
    transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(here + "/plain")
    fast.save_pretrained(here + "/plain")
    np.save(here + "/plain.npy", as_its_page_says(here + "/plain", TASK))
    np.save(here + "/plain-instructed.npy", as_its_page_says(here + "/plain", "rate it"))
    as_cross_encoder(here + "/plain", here + "/two-words", True)
    as_cross_encoder(here + "/plain", here + "/one-word", False)
"""
)


def run_library(script: str, directory: Path) -> None:
    """Run a script that makes models and references, in a process of its own."""
    pairs = directory / "pairs.json"
    pairs.write_text(json.dumps(PAIRS))
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(directory), str(pairs), str(LONGEST)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]


def make_cross_encoders(directory: Path) -> None:
    """A folder a kind; in it ``plain`` and, as CrossEncoder saves it, ``st``."""
    run_library(_CROSS_ENCODERS, directory)


def make_causal_rerankers(directory: Path) -> None:
    """A folder a kind; in it ``plain`` and, as CrossEncoder saves them, ``two-words`` and ``one-word``."""
    run_library(_CAUSAL_RERANKERS, directory)


def requests_of(pairs: Sequence[tuple[str, str]], **rest: Any) -> list[Request]:
    """One request a pair."""
    return [Request(query={"text": query}, items=[{"text": item}], **rest) for query, item in pairs]


def answer(model: "PairModel", *requests: Request) -> list[Any]:
    """What a micro-batch of requests is answered with: rankings, or errors."""
    prepared = model.prepare("score", requests)
    answers = model.finish(prepared, model.run(prepared))
    return [msgspec.msgpack.decode(one) if isinstance(one, bytes) else one for one in answers]


def score(model: "PairModel", pairs: Sequence[tuple[str, str]], **rest: Any) -> npt.NDArray[np.float64]:
    """The scores of pairs that came in one micro-batch, a request each."""
    return np.array([ranking[0]["score"] for ranking in answer(model, *requests_of(pairs, **rest))])
