"""Tiny random extractors of the real architectures, and what their own libraries say of ``TEXTS``.

``python -m tests.tiny_extractors OUT`` makes the folders and ``OUT/said.json``: by model and case, one list a text. It
uses the libraries alone, nothing of Farmhand.
"""

import json
import sys
from pathlib import Path
from typing import Any

LABELS = ["person", "city name", "year"]
LONG = "the quick brown fox of London jumps over Ada Lovelace, who left Paris in 1843 ; "
EDGES = [*("x " * count for count in range(60, 66)), *("y " * count for count in (23, 24, 25))]
"""From below to above the 64 tokens, or 24 words, that models take."""
TEXTS = [
    "Ada went to Paris .",
    LONG,
    "  Ünïcödé and 漢字\nin Paris 🙂, (Ada) ",
    "Ada",
    *EDGES,
    LONG * 3,
]
SCHEMA = {
    "entities": {"person": "somebody's name", "city name": ""},
    "relations": ["lives in", "left"],
    "classifications": [
        {"task": "mood", "labels": ["good", "bad"]},
        {"task": "topics", "labels": ["a b", "c", "d"], "multi_label": True, "cls_threshold": 0.4},
    ],
    "structures": {
        "trip": {
            "fields": [
                {"name": "who", "dtype": "str"},
                {"name": "where"},
                {"name": "how", "dtype": "str", "choices": ["car", "train"]},
            ]
        }
    },
}
NER_CASES: dict[str, dict[str, Any]] = {
    **{name: {"aggregation_strategy": name} for name in ("none", "simple", "first", "average", "max")},
    "windows": {"aggregation_strategy": "simple", "stride": 8},
}
NLI_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi": {"multi_label": True},
    "worded": {"hypothesis_template": "Is {} in it?"},
}
GLINER_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "low": {"threshold": 0.2},
    "nested": {"flat_ner": False},
    "several": {"multi_label": True, "threshold": 0.3},
}
GLINER2_THRESHOLD = 0.4
GLICLASS_CASES: dict[str, dict[str, Any]] = {
    "all": {"threshold": 0.0},
    "plain": {},
    "single": {"classification_type": "single-label"},
    "prompted": {"threshold": 0.0, "prompt": "What is it about? "},
}
GLINER_KINDS = ("gliner-span", "gliner-token", "gliner-bi")
GLICLASS_ENCODERS = {"gliclass-before": "deberta", "gliclass-behind": "bert", "gliclass-decoder": "qwen3"}
RELEX = "gliner-relex"
RELATIONS = ["lives in", "left"]
RELEX_OPTIONS = {"threshold": 0.4, "relation_threshold": 0.5}
GLINER2_KINDS = ("gliner2-span", "gliner2-boundary")
GLICLASS_KINDS = ("gliclass-before", "gliclass-behind", "gliclass-decoder")
SPREAD = {
    "gliner-span": 1.5,
    "gliner-token": 1.5,
    "gliner-bi": 1.5,
    "gliner-relex": 1.5,
    "gliner2-span": 1.8,
    "gliner2-boundary": 1.0,
    "gliclass-before": 8.0,
    "gliclass-behind": 8.0,
    "gliclass-decoder": 3.0,
}

LETTERS = [chr(code) for code in range(33, 127)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "Ada", "Paris", *LETTERS, *(f"##{one}" for one in LETTERS)]


def tokenizer(longest: int = 512, *further: str) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = models.WordPiece({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]", max_input_chars_per_word=50)  # noqa: S106
    made = Tokenizer(pieces)
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=longest,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")},
    )
    if further:
        fast.add_tokens(list(further), special_tokens=True)
    return fast


def encoder(kind: str, labels: tuple[str, ...] = ()) -> Any:
    """The config of a tiny BERT, DeBERTa or Qwen3."""
    from transformers import BertConfig, DebertaV2Config, Qwen3Config

    shape: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "pad_token_id": 0,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    if labels:
        shape |= {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    if kind == "bert":
        return BertConfig(**shape)
    if kind == "qwen3":
        return Qwen3Config(**shape, num_key_value_heads=2, head_dim=8)
    return DebertaV2Config(
        **shape,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
        position_biased_input=False,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_buckets=16,
    )


def spread(model: Any, encoders: str, times: float) -> None:
    """Make the weights outside its encoders larger, so that scores differ from 0.5 and from each other."""
    import torch

    with torch.no_grad():
        for name, weights in model.named_parameters():
            if encoders not in name:
                weights.mul_(times)


def build_ner(place: Path) -> None:
    import torch
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(1)
    config = encoder("bert", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"))
    AutoModelForTokenClassification.from_config(config).save_pretrained(place)
    tokenizer(64).save_pretrained(place)


def make_ner(out: Path) -> dict[str, Any]:
    build_ner(out / "ner")
    return {"ner": say_ner(out / "ner")}


def say_ner(place: Path) -> dict[str, Any]:
    from transformers import pipeline

    said = {}
    for case, options in NER_CASES.items():
        run = pipeline("token-classification", model=str(place), device="cpu", **options)
        said[case] = [
            [[one.get("entity_group") or one["entity"], float(one["score"]), one["start"], one["end"]] for one in found]
            for found in map(run, TEXTS)
        ]
    return said


NLI_KINDS = {
    "nli-three": ("bert", ("contradiction", "neutral", "entailment")),
    "nli-two": ("deberta", ("entailment", "not_entailment")),
}


def build_nli(place: Path, name: str, seed: int = 0) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(encoder(*NLI_KINDS[name])).save_pretrained(place)
    tokenizer(64).save_pretrained(place)


def make_nli(out: Path) -> dict[str, Any]:
    for seed, name in enumerate(NLI_KINDS):
        build_nli(out / name, name, seed)
    return {name: say_nli(out / name) for name in NLI_KINDS}


def say_nli(place: Path) -> dict[str, Any]:
    from transformers import pipeline

    run = pipeline("zero-shot-classification", model=str(place), device="cpu")
    said = {case: _classes(run, LABELS, options) for case, options in NLI_CASES.items()}
    return {**said, "one": _classes(run, LABELS[:1], {})}


def _classes(run: Any, labels: list[str], options: dict[str, Any]) -> Any:
    told = [run(text, labels, **options) for text in TEXTS]
    return [list(zip(one["labels"], one["scores"], strict=True)) for one in told]


def build_gliner(out: Path, name: str, seed: int = 0) -> None:
    import torch
    from gliner import GLiNER
    from gliner.config import GLiNERConfig

    backbone = out / "backbones" / name
    encoder("bert" if name == "gliner-bi" else "deberta").save_pretrained(backbone)
    tokenizer().save_pretrained(backbone)
    config = GLiNERConfig(
        model_name=str(backbone),
        labels_encoder=str(backbone) if name == "gliner-bi" else None,
        span_mode="token_level" if name == "gliner-token" else "markerV0",
        max_width=4,
        hidden_size=32,
        max_len=24,
        has_rnn=True,
        relations_layer="dot" if name == RELEX else None,
    )
    torch.manual_seed(seed)
    model = GLiNER.from_config(config.to_dict(), backbone_from_pretrained=False)
    spread(model, "token_rep_layer", SPREAD[name])
    model.save_pretrained(out / name, safe_serialization=True)


def make_gliner(out: Path) -> dict[str, Any]:
    from gliner import GLiNER

    said = {}
    for seed, name in enumerate((*GLINER_KINDS, RELEX)):
        build_gliner(out, name, seed)
        model = GLiNER.from_pretrained(str(out / name), local_files_only=True)
        if name == RELEX:
            said[name] = {"relations": [_related(model, text) for text in TEXTS]}
            continue
        said[name] = {
            case: [_spans(model.predict_entities(text, LABELS, **options)) for text in TEXTS]
            for case, options in GLINER_CASES.items()
        }
    return said


def _spans(found: list[dict[str, Any]]) -> list[list[Any]]:
    return [[one["label"], one["score"], one["start"], one["end"]] for one in found]


def _related(model: Any, text: str) -> list[Any]:
    (found,), (related,) = model.inference([text], LABELS, RELATIONS, **RELEX_OPTIONS)
    ends = [[one["relation"], one["score"], one["head"]["text"], one["tail"]["text"]] for one in related]
    return [_spans(found), ends]


def build_gliner2(out: Path, name: str, seed: int = 0) -> None:
    import torch
    from gliner2 import ExtractorConfig
    from gliner2.inference.engine import BoundaryExtractor, SpanExtractor

    is_span = name == "gliner2-span"
    backbone, words = encoder("deberta" if is_span else "bert"), tokenizer()
    head = {"max_width": 4, "counting_layer": "count_lstm_v2"} if is_span else {"architecture": "boundary"}
    config = ExtractorConfig(model_name=str(out / "backbones" / name), **head)
    torch.manual_seed(seed)
    made = (SpanExtractor if is_span else BoundaryExtractor)(config, encoder_config=backbone, tokenizer=words)
    spread(made, "encoder.", SPREAD[name])
    made.save_pretrained(out / name)


def make_gliner2(out: Path) -> dict[str, Any]:
    from gliner2 import AutoExtractor

    said = {}
    for seed, name in enumerate(GLINER2_KINDS):
        build_gliner2(out, name, seed)
        model = AutoExtractor.from_pretrained(str(out / name))
        both = {"include_confidence": True, "include_spans": True, "threshold": GLINER2_THRESHOLD}
        said[name] = {
            "labels": [model.extract_entities(text, LABELS, **both) for text in TEXTS],
            "schema": [model.extract(text, model.create_schema().from_dict(SCHEMA), **both) for text in TEXTS],
        }
    return said


def build_gliclass(out: Path, name: str, seed: int = 0) -> None:
    import torch
    from gliclass import GLiClassModel, GLiClassModelConfig

    marks = ("<<LABEL>>", "<<SEP>>", "<<EXAMPLE>>")
    config = GLiClassModelConfig(
        encoder_config=encoder(GLICLASS_ENCODERS[name]),
        architecture_type="decoder-kv" if name == "gliclass-decoder" else "uni-encoder",
        encoder_model=str(out / "backbones" / name),
        vocab_size=len(WORDS) + len(marks),
        class_token_index=len(WORDS),
        text_token_index=len(WORDS) + 1,
        example_token_index=len(WORDS) + 2,
        sep_token_index=len(WORDS) + 1,  # the name that a decoder reads it by
        hidden_size=32,
        prompt_first=name == "gliclass-before",
        pooling_strategy="avg" if name == "gliclass-before" else "first",
        problem_type="multi_label_classification",
        logit_scale_init_value=1.0,
    )
    torch.manual_seed(seed)
    made = GLiClassModel(config)
    spread(made, "coder_model", SPREAD[name])  # encoder_model, decoder_model
    made.save_pretrained(out / name)
    tokenizer(512, *marks).save_pretrained(out / name)


def make_gliclass(out: Path) -> dict[str, Any]:
    from gliclass import GLiClassModel, ZeroShotClassificationPipeline
    from transformers import AutoTokenizer

    said = {}
    for seed, name in enumerate(GLICLASS_KINDS):
        build_gliclass(out, name, seed)
        run = ZeroShotClassificationPipeline(
            GLiClassModel.from_pretrained(str(out / name)),
            AutoTokenizer.from_pretrained(str(out / name)),
            device="cpu",
            progress_bar=False,
        )
        said[name] = {
            case: [[[one["label"], one["score"]] for one in run(text, LABELS, **options)[0]] for text in TEXTS]
            for case, options in GLICLASS_CASES.items()
        }
    return said


def main(out: Path) -> None:
    said: dict[str, Any] = {}
    for make in (make_ner, make_nli, make_gliner, make_gliner2, make_gliclass):
        said |= make(out)
    (out / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
