"""Tiny models that answer with more than one pooled vector, of the real architectures, and what they should answer.

Both are made once a session, in a process of its own which knows nothing of Farmhand: sparse encoders are asked through
sentence-transformers, late interaction and BGE-M3 are computed in float64 from transformers' plain encoders.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from config_db.spec import ModelSpec, Source
from tasks.messages import Request

LONGEST = 48
"""Tokens of a text; a letter is a token."""


def _letters(count: int, start: int) -> str:
    text = [chr(ord("a") + (start + place * place) % 26) for place in range(count)]
    return " ".join("".join(text[at : at + 4]) for at in range(0, count, 4))


TEXTS = [
    "a farm",
    "The quick, brown fox: jumps (over) the lazy dog!",
    "",
    "  ... ",
    "Ünïcödé and 漢字 and emoji 🙂",
    *(_letters(count, count) for edge in (16, 20, 30, 40, LONGEST) for count in range(edge - 4, edge + 2)),
    _letters(700, 3),
    *(f"number {n} " * (n % 4 + 1) for n in range(9)),
]
"""Among others, texts round every length at which one of the models below cuts a query or a document."""

SPARSE = ("bert", "bert-sum", "xlm-roberta", "distilbert", "mpnet", "electra", "modernbert", "free", "routed", "plain")
MULTIVECTOR = ("stanford", "pylate", "moderncolbert", "native", "layers")

_COMMON = """
import json, shutil, string, sys
from pathlib import Path
import numpy as np
import torch, transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models as tm, normalizers, pre_tokenizers, processors
from torch.nn.functional import normalize
out, texts, longest = Path(sys.argv[1]), json.load(open(sys.argv[2])), int(sys.argv[3])
letters = [chr(c) for c in range(33, 127)]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]", *letters, *("##" + c for c in letters)]
piece = tm.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]", max_input_chars_per_word=50)
raw = Tokenizer(piece)
raw.normalizer = normalizers.BertNormalizer()
raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
raw.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]",
    cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", eos_token="[SEP]", model_max_length=longest)
tiny = dict(vocab_size=len(words) + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, pad_token_id=0)
small = dict(tiny, max_position_embeddings=longest + 16, initializer_range=0.5)
configs = {
    "bert": lambda: transformers.BertConfig(**small),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**small, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=len(words) + 2, dim=32, n_layers=2, n_heads=4,
        hidden_dim=64, max_position_embeddings=longest + 16, initializer_range=0.5),
    "mpnet": lambda: transformers.MPNetConfig(**small),
    "electra": lambda: transformers.ElectraConfig(**small, embedding_size=32),
    "modernbert": lambda: transformers.ModernBertConfig(**dict(tiny, num_hidden_layers=3), cls_token_id=2,
        sep_token_id=3, local_attention=8, initializer_range=0.1, initializer_cutoff_factor=3.0,
        decoder_bias=True),
}
def save(kind, auto, place, seed):
    torch.manual_seed(seed)
    module = auto.from_config(configs[kind]())
    for name, one in module.named_parameters():
        if "bias" in name:  # initialised with zeros, a bias that is left out would not be missed
            torch.nn.init.normal_(one, std=0.3)
    module.save_pretrained(place)
    fast.save_pretrained(place)
    return str(place)
def rows(directory, name, found):
    np.savez(directory / f"{name}.npz", *[np.asarray(one) for one in found])
"""

_SPARSE = """
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding, SpladePooling, Transformer
mlm = transformers.AutoModelForMaskedLM
def splade(kind, seed, **pooling):
    place = save(kind, mlm, out / "bare" / f"{kind}-{seed}", seed)
    return [Transformer(place, transformer_task="fill-mask"), SpladePooling(**pooling)]
def routed(queries, documents):
    return [Router.for_query_document(query_modules=queries, document_modules=documents)]
torch.manual_seed(9)
table = SparseStaticEmbedding(fast, torch.rand(len(words)).mul(2).relu())
both = splade("bert", 7)
made = {
    "bert": splade("bert", 1, activation_function="log1p_relu"),
    "bert-sum": splade("bert", 2, pooling_strategy="sum"),
    "xlm-roberta": splade("xlm-roberta", 3),
    "distilbert": splade("distilbert", 4),
    "mpnet": splade("mpnet", 5),
    "electra": splade("electra", 6),
    "modernbert": splade("modernbert", 8),
    "free": routed([table], splade("distilbert", 10, activation_function="log1p_relu")),
    "routed": both,
}
for name, modules in made.items():
    prompts = {"query": "ask: ", "document": "say: "} if name == "electra" else None
    limit = 12 if name == "mpnet" else None
    SparseEncoder(modules=modules, prompts=prompts, max_active_dims=limit).save(str(out / name))
save("bert", mlm, out / "plain", 11)
# both ways through one encoder, as a router can be written down by hand
(out / "routed" / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "",
    "type": "sentence_transformers.models.Router"}]))
kind = "sentence_transformers.sparse_encoder.models."
(out / "routed" / "router_config.json").write_text(json.dumps({
    "types": {"": kind + "MLMTransformer", "1_SpladePooling": kind + "SpladePooling"},
    "structure": {"query": ["", "1_SpladePooling"], "document": ["", "1_SpladePooling"]},
    "parameters": {"default_route": "query", "allow_empty_key": True}}))
for name in [*made, "plain"]:
    model = SparseEncoder(str(out / name), device="cpu")
    for task, ask in (("query", model.encode_query), ("document", model.encode_document)):
        np.save(out / name / f"{task}.npy", ask(texts, batch_size=8, convert_to_sparse_tensor=False).numpy())
"""

_MULTIVECTOR = """
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
auto = transformers.AutoModel
torch.manual_seed(21)
def dense(width, into, **rest):
    return Dense(width, into, module_input_name="token_embeddings", **rest)
none = torch.nn.Identity()

place = out / "stanford"
save("bert", auto, place, 12)
weights = {f"bert.{name}": tensor for name, tensor in load_file(place / "model.safetensors").items()}
save_file({**weights, "linear.weight": torch.randn(16, 32)}, place / "model.safetensors", {"format": "pt"})
config = json.loads((place / "config.json").read_text())
(place / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
(place / "artifact.metadata").write_text(json.dumps({"query_token_id": "[unused0]", "doc_token_id": "[unused1]",
    "query_maxlen": 16, "doc_maxlen": 40, "mask_punctuation": True, "attend_to_mask_tokens": False}))

def pylate(name, layers, kind, seed, **settings):
    bare = save(kind, auto, out / "bare" / f"{kind}-{seed}", seed)
    MultiVectorEncoder(modules=[Transformer(bare), *layers]).save(str(out / name))
    parts = [("", "sentence_transformers.models.Transformer")]
    parts += [(f"{n + 1}_Dense", "pylate.models.Dense.Dense") for n in range(len(layers))]
    (out / name / "modules.json").write_text(json.dumps(
        [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(parts)]))
    (out / name / "config_sentence_transformers.json").write_text(json.dumps(
        {"model_type": "ColBERT", "prompts": {}, **settings}))

pylate("pylate", [dense(32, 24, bias=False, activation_function=none)], "bert", 13, query_prefix="[unused0]",
    document_prefix="[unused1]", query_length=20, document_length=30, attend_to_expansion_tokens=True,
    skiplist_words=["!", "a", "nowhere in the vocabulary"])
pylate("layers", [dense(32, 40, activation_function=torch.nn.GELU()),
    dense(40, 24, bias=False, activation_function=none, use_residual=True)], "bert", 14,
    query_prefix="query: ", document_prefix="", do_query_expansion=False, document_length=30, skiplist_words=[])
fast.add_tokens([AddedToken("[Q] "), AddedToken("[D] ")])
pylate("moderncolbert", [dense(32, 16, bias=False, activation_function=none)], "modernbert", 15, query_prefix="[Q] ",
    document_prefix="[D] ", query_length=16, document_length=30, attend_to_expansion_tokens=False)
bare = save("xlm-roberta", auto, out / "bare" / "native", 16)
MultiVectorEncoder(modules=[
    Transformer(bare, query_expansion={"strategy": "min", "length": 20, "token": "[unused1]"}, document_length=40),
    dense(32, 16, bias=True, activation_function=none),
    MultiVectorMask([",", "b"], skiplist_tasks=["query", "document"])], prompts={"query": "ask "},
    ).save(str(out / "native"))

for name in ("stanford", "pylate", "layers", "moderncolbert", "native"):
    model = MultiVectorEncoder(str(out / name), device="cpu")
    rows(out / name, "library-query", model.encode_query(texts, batch_size=8, convert_to_numpy=True))
    rows(out / name, "library-document", model.encode_document(texts, batch_size=8, convert_to_numpy=True))
    asked, given = model.encode_query(texts[:3]), model.encode_document(texts)
    np.save(out / name / "maxsim.npy", model.similarity(asked, given).numpy())

# the same in float64 from the plain encoder: the marker as a token after the first, one text at a time
def apart(name, marker, longest, skipped=(), expanded=None, seen=False):
    encoder = auto.from_pretrained(out / name).double().eval()
    linear = load_file(out / name / ("1_Dense/model.safetensors" if name != "stanford" else "model.safetensors"))
    projection = linear["linear.weight"].double()
    found = []
    for text in texts:
        ids = fast(text, truncation=True, max_length=longest - 1)["input_ids"]
        ids = [ids[0], fast.convert_tokens_to_ids(marker), *ids[1:]]
        real = len(ids)
        ids += [fast.mask_token_id] * ((expanded or 0) - real)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        if not seen:
            mask[0, real:] = 0
        with torch.no_grad():
            states = encoder(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
        vectors = normalize(states @ projection.T, dim=-1)
        kept = [n for n, one in enumerate(ids) if fast.convert_ids_to_tokens(one) not in skipped]
        found.append(vectors[kept].numpy())
    return found

marks = list(string.punctuation)
rows(out / "stanford", "query", apart("stanford", "[unused0]", 16, expanded=16))
rows(out / "stanford", "document", apart("stanford", "[unused1]", 40, marks))
rows(out / "pylate", "query", apart("pylate", "[unused0]", 20, expanded=20, seen=True))
rows(out / "pylate", "document", apart("pylate", "[unused1]", 30, ["!", "a"]))
rows(out / "moderncolbert", "query", apart("moderncolbert", "[Q] ", 16, expanded=16))
rows(out / "moderncolbert", "document", apart("moderncolbert", "[D] ", 30, marks))
"""

_BGE_M3 = """
place = out / "m3"
save("xlm-roberta", transformers.AutoModel, place, 17)
torch.manual_seed(18)
heads = {"sparse_linear": torch.nn.Linear(32, 1), "colbert_linear": torch.nn.Linear(32, 24)}
for name, head in heads.items():
    save_file(head.state_dict(), place / f"{name}.safetensors")
encoder = transformers.AutoModel.from_pretrained(place).double().eval()
heads = {name: head.double() for name, head in heads.items()}
def states(text):
    read = fast(text, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        return read["input_ids"][0], encoder(**read).last_hidden_state[0]
rows(place, "dense", [normalize(states(text)[1][0], dim=0).numpy() for text in texts])
rows(place, "multivector", [normalize(heads["colbert_linear"](states(text)[1][1:]), dim=-1).detach() for text in texts])
def weights(text):
    row = np.zeros(len(words) + 2)
    for token, state in zip(*states(text), strict=True):
        if int(token) not in fast.all_special_ids:
            row[token] = max(row[token], float(heads["sparse_linear"](state).relu()))
    return row
rows(place, "sparse", [weights(text) for text in texts])
"""


def made(factory: pytest.TempPathFactory) -> Path:
    """The folder of all tiny models, made in this session's first call."""
    out = factory.getbasetemp() / "token-models"
    if out.exists():
        return out
    out.mkdir()
    (out / "texts.json").write_text(json.dumps(TEXTS))
    script = "\n".join((_COMMON, _SPARSE, _MULTIVECTOR, _BGE_M3))
    arguments = [str(out), str(out / "texts.json"), str(LONGEST)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def spec_of(folder: Path, family: str, **changes: Any) -> ModelSpec:
    """A spec that leaves everything to the folder."""
    outputs = {"sparse": ("sparse",), "multivector": ("multivector",)}.get(family, ("dense", "sparse", "multivector"))
    operations = ("encode",) if family == "sparse" else ("encode", "score")
    base = ModelSpec(
        id=f"org/{folder.name}",
        family=family,
        source=Source(path=str(folder)),
        operations=operations,
        outputs=outputs,
        precision="float32",
    )
    return msgspec.structs.replace(base, **changes)


def answer(model: Any, *requests: Request, operation: str = "encode") -> list[Any]:
    """What a loaded model answers to a micro-batch: decoded results, or errors."""
    prepared = model.prepare(operation, requests)
    answers = model.finish(prepared, model.run(prepared))
    assert len(prepared.request_tokens) == len(answers)
    return [msgspec.msgpack.decode(one) if isinstance(one, bytes) else one for one in answers]


def ask(texts: list[str], **rest: Any) -> Request:
    """A request for these texts."""
    return Request(items=[{"text": text} for text in texts], **rest)
