"""Extractors against their own libraries, which run in a process of their own (``tests.tiny_extractors``)."""

import ast
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from common.errors import FarmError, ModelLoadError
from config_db.hub import Hub
from config_db.model_folders import spec_of_directory
from tasks.messages import Request
from tests import tiny_extractors as tiny
from tests.hub import COMMIT, serving_hub
from tests.weights import ask_here, contents, setup_in
from workers.host.families.extraction import ExtractModel
from workers.host.families.protocol import Device
from workers.host.families.registry import find
from workers.weights.resolve import resolve

pytestmark = pytest.mark.filterwarnings("default:.*torch.jit.script:DeprecationWarning")  # transformers' DeBERTa
ROOT = Path(__file__).resolve().parents[2]
TRUNCATE = {"overflow_policy": "truncate"}
PASS_TOKENS = 256
"""Small, so that the texts of one request are laid out over several passes."""


@pytest.fixture(scope="session")
def said(tiny_out: Path) -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads((tiny_out / "said.json").read_text())
    return content


@pytest.fixture(scope="session")
def loaded(tiny_out: Path) -> Callable[..., ExtractModel]:
    """Loads a model once."""
    models: dict[str, ExtractModel] = {}

    def model(name: str) -> ExtractModel:
        if name not in models:
            models[name] = load(tiny_out / name)
        return models[name]

    return model


def load(folder: Path, **changes: Any) -> ExtractModel:
    spec = msgspec.structs.replace(spec_of_directory(folder), **changes)
    model = find(spec.family, {}).load(spec, folder, Device(pass_tokens=PASS_TOKENS))
    assert isinstance(model, ExtractModel)
    return model


def request_of(texts: Sequence[Any], labels: Sequence[str] | None = tiny.LABELS, **rest: Any) -> Request:
    items = [{"id": f"item-{n}", "text": text} for n, text in enumerate(texts)]
    return Request(items=items, labels=list(labels) if labels is not None else None, **rest)


def answers(model: ExtractModel, *requests: Request) -> list[Any]:
    prepared = model.prepare("extract", requests)
    given = model.finish(prepared, model.run(prepared))
    return [msgspec.msgpack.decode(one) if isinstance(one, bytes) else one for one in given]


def extract(model: ExtractModel, texts: Sequence[str], **rest: Any) -> list[dict[str, Any]]:
    (items,) = answers(model, request_of(texts, **rest))
    assert not isinstance(items, FarmError), items.message
    return list(items)


def entities(item: Mapping[str, Any]) -> list[list[Any]]:
    return [[one["label"], one["score"], one["start"], one["end"]] for one in item["entities"]]


def classes(item: Mapping[str, Any]) -> list[list[Any]]:
    return [[one["label"], one["score"]] for one in item["classifications"]]


def assert_same(found: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]], within: float = 1e-4) -> None:
    """The same labels and places in the same order, with the same scores but for rounding."""
    assert [[one[0], *one[2:]] for one in found] == [[one[0], *one[2:]] for one in expected]
    assert [one[1] for one in found] == pytest.approx([one[1] for one in expected], abs=within)


@pytest.mark.parametrize("case", tiny.NER_CASES)
def test_token_classification_agrees_with_the_pipeline(
    loaded: Callable[..., ExtractModel], said: Mapping[str, Any], case: str
) -> None:
    options = {**TRUNCATE, **tiny.NER_CASES[case]}
    found = extract(loaded("ner"), tiny.TEXTS, labels=None, options=options)
    for item, expected, text in zip(found, said["ner"][case], tiny.TEXTS, strict=True):
        assert_same(entities(item), expected)
        assert all(one["text"] == text[one["start"] : one["end"]] for one in item["entities"])


@pytest.mark.parametrize("case", [*tiny.NLI_CASES, "one"])
@pytest.mark.parametrize("name", ["nli-three", "nli-two"])
def test_nli_agrees_with_the_zero_shot_pipeline(
    loaded: Callable[..., ExtractModel], said: Mapping[str, Any], name: str, case: str
) -> None:
    labels = tiny.LABELS if case != "one" else tiny.LABELS[:1]
    options = {**TRUNCATE, **tiny.NLI_CASES.get(case, {})}
    found = extract(loaded(name), tiny.TEXTS, labels=labels, options=options)
    for item, expected in zip(found, said[name][case], strict=True):
        assert_same(classes(item), expected)


@pytest.mark.parametrize("case", tiny.GLINER_CASES)
@pytest.mark.parametrize("name", tiny.GLINER_KINDS)
def test_gliner_agrees_with_its_library(
    loaded: Callable[..., ExtractModel], said: Mapping[str, Any], name: str, case: str
) -> None:
    found = extract(loaded(name), tiny.TEXTS, options={**TRUNCATE, **tiny.GLINER_CASES[case]})
    for item, expected, text in zip(found, said[name][case], tiny.TEXTS, strict=True):
        assert_same(entities(item), expected)
        assert all(one["text"] == text[one["start"] : one["end"]] for one in item["entities"])


def test_gliner_relates_entities_as_its_library_does(
    loaded: Callable[..., ExtractModel], said: Mapping[str, Any]
) -> None:
    options = {**TRUNCATE, **tiny.RELEX_OPTIONS}
    found = extract(loaded(tiny.RELEX), tiny.TEXTS, options=options, output_schema={"relations": tiny.RELATIONS})
    for item, (expected, related) in zip(found, said[tiny.RELEX]["relations"], strict=True):
        assert_same(entities(item), expected)
        relations = [[one["relation"], one["score"], one["head"], one["tail"]] for one in item["relations"]]
        assert_same(relations, related)
    assert any(item["relations"] for item in found)


@pytest.mark.parametrize("case", tiny.GLICLASS_CASES)
@pytest.mark.parametrize("name", tiny.GLICLASS_KINDS)
def test_gliclass_agrees_with_its_library(
    loaded: Callable[..., ExtractModel], said: Mapping[str, Any], name: str, case: str
) -> None:
    asked = tiny.GLICLASS_CASES[case]
    options = {"multi_label": "classification_type" not in asked, "threshold": asked.get("threshold", 0.5)}
    found = extract(loaded(name), tiny.TEXTS, options=options, instruction=asked.get("prompt"))
    for item, expected in zip(found, said[name][case], strict=True):
        assert_same(classes(item), expected)


@pytest.mark.parametrize("case", ["labels", "schema"])
@pytest.mark.parametrize("name", tiny.GLINER2_KINDS)
def test_gliner2_agrees_with_its_library(
    loaded: Callable[..., ExtractModel], said: Mapping[str, Any], name: str, case: str
) -> None:
    asked: dict[str, Any] = {"labels": None, "output_schema": tiny.SCHEMA} if case == "schema" else {}
    found = extract(loaded(name), tiny.TEXTS, options={"threshold": tiny.GLINER2_THRESHOLD}, **asked)
    assert any(item["relations"] for item in found) or case == "labels"
    for item, expected, text in zip(found, said[name][case], tiny.TEXTS, strict=True):
        assert_same(entities(item), _spans(text, expected["entities"]))
        assert_same(classes(item), _classes(expected))
        assert item["relations"] == [
            {**one, "score": pytest.approx(one["score"], abs=1e-4)} for one in _relations(text, expected)
        ]
        assert _close(item["data"], _data(text, expected))


def _spans(text: str, told: Mapping[str, Any]) -> list[list[Any]]:
    """What the library found, without the full stop that it puts after a text."""
    return [
        [label, one["confidence"], one["start"], min(one["end"], len(text))]
        for label, several in told.items()
        for one in several
        if one["start"] < len(text)
    ]


def _classes(told: Mapping[str, Any]) -> list[list[Any]]:
    several = [told["mood"], *told["topics"]] if "mood" in told else []
    return [[one["label"], one["confidence"]] for one in several]


def _relations(text: str, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "head": text[one["head"]["start"] : one["head"]["end"]],
            "tail": text[one["tail"]["start"] : one["tail"]["end"]],
            "relation": relation,
            "score": min(one["head"]["confidence"], one["tail"]["confidence"]),
        }
        for relation, several in told.get("relation_extraction", {}).items()
        for one in several
        if max(one["head"]["start"], one["tail"]["start"]) < len(text)
    ]


def _data(text: str, told: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is neither an entity nor a relation; of places, those in the text."""
    data = {name: one for name, one in told.items() if name not in ("entities", "relation_extraction")}
    for trip in data.get("trip", ()):
        for name in ("who", "where"):
            several = trip[name] if isinstance(trip[name], list) else [one for one in (trip[name],) if one]
            kept = [
                {**one, "text": text[one["start"] : one["end"]], "end": min(one["end"], len(text))}
                for one in several
                if one["start"] < len(text)
            ]
            trip[name] = kept if isinstance(trip[name], list) else next(iter(kept), None)
    return data or None


def _close(left: Any, right: Any) -> bool:
    """Equal but for rounding, at any depth."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_close(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_close, left, right))
    return bool(left == pytest.approx(right, abs=1e-4)) if isinstance(left, float) else bool(left == right)


EVERY = ("ner", "nli-three", "nli-two", *tiny.GLINER_KINDS, tiny.RELEX, *tiny.GLINER2_KINDS, *tiny.GLICLASS_KINDS)


@pytest.mark.parametrize("name", EVERY)
def test_batch_mates_and_order_change_nothing_beyond_rounding(loaded: Callable[..., ExtractModel], name: str) -> None:
    model, short = loaded(name), [text for text in tiny.TEXTS if len(text.split()) <= 16]
    labels = [None, ["PER"]] if name == "ner" else [tiny.LABELS, [*tiny.LABELS, "colour of hair"]]
    asked = [{"labels": one, "options": {"threshold": threshold}} for one in labels for threshold in (0.3, 0.5)]
    alone = [[extract(model, [text], **one)[0] for text in short] for one in asked]
    backward = answers(model, *(request_of(short[::-1], **one) for one in asked))
    forward = answers(model, *(request_of(short, **one) for one in asked))
    for found in (forward, [items[::-1] for items in backward]):
        for items, expected in zip(found, alone, strict=True):
            for item, own in zip(items, expected, strict=True):
                assert_same(entities(item), entities(own), within=1e-5)
                assert_same(classes(item), classes(own), within=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_blank_and_unreadable_items_are_answered_alone(loaded: Callable[..., ExtractModel], name: str) -> None:
    labels = None if name == "ner" else tiny.LABELS
    blank, spaces, nothing, good = extract(loaded(name), ["", " \n ", None, "Ada"], labels=labels)
    for item in (blank, spaces, good):
        assert "error" not in item
    assert blank["entities"] == spaces["entities"] == []
    assert nothing["error"]["code"] == "INVALID_INPUT"
    assert [nothing["entities"], nothing["relations"], nothing["classifications"], nothing["data"]] == [
        [],
        [],
        [],
        None,
    ]


@pytest.mark.parametrize("name", ["ner", "nli-two", "gliner-span", "gliclass-behind", "gliner2-boundary"])
def test_a_text_that_is_too_long_is_refused_alone(loaded: Callable[..., ExtractModel], name: str) -> None:
    labels = None if name == "ner" else tiny.LABELS
    good, long = extract(loaded(name), ["Ada", "x " * 600], labels=labels)
    assert "error" not in good
    assert long["error"]["code"] == "INPUT_TOO_LONG"
    assert "600" in long["error"]["message"] or "tokens" in long["error"]["message"]


@pytest.mark.parametrize(
    ("name", "asked", "param"),
    [
        ("ner", {"labels": ["animal"]}, "params.labels[0]"),
        ("ner", {"labels": None, "options": {"aggregation_strategy": "sum"}}, "params.options.aggregation_strategy"),
        ("ner", {"labels": None, "options": {"stride": 62}}, "params.options.stride"),
        ("ner", {"labels": None, "output_schema": {"a": 1}}, "params.output_schema"),
        ("nli-two", {"labels": None}, "params.labels"),
        ("nli-two", {"options": {"hypothesis_template": "no slot"}}, "params.options.hypothesis_template"),
        ("nli-two", {"labels": ["x " * 100]}, "params.labels"),
        ("gliner-span", {"labels": None}, "params.labels"),
        ("gliner-span", {"options": {"threshold": 1.5}}, "params.options.threshold"),
        ("gliner-span", {"options": {"flat_ner": 1}}, "params.options.flat_ner"),
        ("gliner-span", {"instruction": "find"}, "params.instruction"),
        ("gliner-span", {"output_schema": {"relations": ["left"]}}, "params.output_schema"),
        ("gliner-relex", {"output_schema": {"relations": "left"}}, "params.output_schema"),
        ("gliner-relex", {"output_schema": {"entities": ["a"]}}, "params.output_schema"),
        ("gliclass-before", {"options": {"multi_label": "no"}}, "params.options.multi_label"),
        ("gliner2-span", {"labels": None}, "params"),
        ("gliner2-span", {"output_schema": {"entities": ["a"]}}, "params.labels"),
        ("gliner2-span", {"labels": None, "output_schema": {"persons": ["a"]}}, "params.output_schema.persons"),
        (
            "gliner2-span",
            {"labels": None, "output_schema": {"classifications": [{"task": "x", "labels": ["a"]}]}},
            "params.output_schema.classifications.0.labels",
        ),
    ],
)
def test_a_request_at_fault_is_answered_alone(
    loaded: Callable[..., ExtractModel], name: str, asked: dict[str, Any], param: str
) -> None:
    good = request_of(["Ada"], None if name == "ner" else tiny.LABELS)
    wrong = request_of(["Ada"], **{"labels": tiny.LABELS, **asked})
    first, error, last = answers(loaded(name), good, wrong, good)
    assert isinstance(error, FarmError)
    assert error.code in ("INVALID_INPUT", "INPUT_TOO_LONG")
    assert (error.param or "").startswith(param)
    assert first == last


def test_labels_keep_entities_of_these_and_a_threshold_cuts(loaded: Callable[..., ExtractModel]) -> None:
    texts = tiny.TEXTS[:4]

    def found(labels: list[str] | None, **options: Any) -> list[Any]:
        return [
            one for item in extract(loaded("ner"), texts, labels=labels, options=options) for one in item["entities"]
        ]

    everything = found(None)
    assert found(["PER"]) == [one for one in everything if one["label"] == "PER"] != everything
    assert found(None, threshold=0.5) == [one for one in everything if one["score"] >= 0.5] != everything


def test_a_models_own_options_hold_until_a_request_names_others(tiny_out: Path) -> None:
    model = load(tiny_out / "gliclass-before", options={"threshold": 1.0})
    assert extract(model, ["Ada"])[0]["classifications"] == []
    assert len(extract(model, ["Ada"], options={"threshold": 0.0})[0]["classifications"]) == len(tiny.LABELS)


def test_two_threads_may_prepare_at_once(loaded: Callable[..., ExtractModel]) -> None:
    """The reader and the loader of a host both tokenise for the same model; what one cuts, the other leaves whole."""
    model, texts = loaded("nli-three"), ["word " * 60] * 4

    def count(options: dict[str, Any]) -> set[int]:
        requests = [request_of(texts, options=options)]
        return {model.prepare("extract", requests).request_tokens[0] for _ in range(40)}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            cut, refused, *_ = threads.map(count, [TRUNCATE, {}] * 2)
    finally:
        sys.setswitchinterval(interval)
    assert (cut, refused) == ({64 * len(tiny.LABELS) * len(texts)}, {0})


@pytest.mark.parametrize("name", ["ner", "nli-two", "gliner-span", "gliclass-before", "gliner2-span"])
def test_numbers_that_are_not_finite_are_an_error_of_the_item(tiny_out: Path, tmp_path: Path, name: str) -> None:
    folder = _changed(
        tiny_out / name, tmp_path, lambda weights: {one: two * float("nan") for one, two in weights.items()}
    )
    (item,) = extract(load(folder), ["Ada went to Paris"], labels=None if name == "ner" else tiny.LABELS)
    assert item["error"]["code"] == "INFERENCE_ERROR"


@pytest.mark.parametrize("name", ["ner", "nli-two", "gliner-bi", "gliclass-before", "gliner2-boundary"])
def test_half_precision_is_half_the_bytes_and_nearly_the_scores(
    tiny_out: Path, loaded: Callable[..., ExtractModel], name: str
) -> None:
    whole, half = loaded(name), load(tiny_out / name, precision="float16")
    assert half.bytes < 0.6 * whole.bytes
    asked: dict[str, Any] = {"labels": None} if name == "ner" else {}
    for read in (entities, classes):
        expected, found = (read(extract(model, tiny.TEXTS[:1], **asked)[0]) for model in (whole, half))
        assert_same(sorted(found), sorted(expected), within=5e-3)


ENCODERS = {"model_name": "org/encoder", "labels_encoder": "labels/encoder"}


@pytest.mark.parametrize("name", ["gliner-span", "gliner-bi"])
def test_an_encoder_of_another_repository_comes_at_the_revision_that_the_source_names(
    tiny_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As most public models are: the weights of the encoder are here, its config and tokenizer are elsewhere."""
    bare, named = _without_encoders(tiny_out / name, tmp_path / "bare")
    with pytest.raises(ModelLoadError, match=r"'org/encoder'.*source\.encoders"):
        load(bare)
    with serving_hub() as hub:
        ask_here(hub, monkeypatch)
        hub.repositories["org/gliner"] = contents(bare)
        for repository in named:
            hub.repositories[repository] = contents(tiny_out / "backbones" / name)
        described = Hub(hub.url).describe("org/gliner")
        assert {one.hub: one.revision for one in described.source.encoders} == dict.fromkeys(named, COMMIT)
        with resolve(described.source, setup_in(tmp_path)) as files:
            model = load(files.path)
    asked = {"options": {"threshold": 0.1, **TRUNCATE}}
    wanted = [entities(item) for item in extract(load(tiny_out / name), tiny.TEXTS, **asked)]
    assert sum(map(len, wanted)) > len(tiny.TEXTS)
    for item, expected in zip(extract(model, tiny.TEXTS, **asked), wanted, strict=True):
        assert_same(entities(item), expected)


def _without_encoders(folder: Path, bare: Path) -> tuple[Path, list[str]]:
    """A copy of a folder that leaves its encoders to other repositories, and their names."""
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*token*", "spm.model", "vocab*"))
    shutil.rmtree(bare / "labels_tokenizer", ignore_errors=True)
    config = json.loads((bare / "gliner_config.json").read_text())
    named = {field: name for field, name in ENCODERS.items() if config[field] is not None}
    unknown = {"encoder_config": None, "labels_encoder_config": None, "class_token_index": -1, "vocab_size": -1}
    changed = {**config, **named, **unknown}
    (bare / "gliner_config.json").write_text(json.dumps(changed))
    return bare, sorted(named.values())


@pytest.mark.parametrize("name", ["ner", "nli-two", "gliner-span", "gliclass-before", "gliner2-span"])
def test_a_folder_that_lacks_weights_is_refused(tiny_out: Path, tmp_path: Path, name: str) -> None:
    """Never random ones in their place."""

    def without_head(weights: dict[str, Any]) -> dict[str, Any]:
        last = [one for one in weights if "encoder" not in one and "token_rep_layer" not in one][-1]
        return {one: two for one, two in weights.items() if one != last}

    folder = _changed(tiny_out / name, tmp_path, without_head)
    with pytest.raises((ModelLoadError, RuntimeError), match=r"lack|[Mm]issing"):
        load(folder)


@pytest.mark.parametrize("name", ["gliner-span", "gliclass-before", "gliner2-span"])
def test_an_encoder_with_code_of_its_own_is_refused(tiny_out: Path, tmp_path: Path, name: str) -> None:
    """The libraries would run it."""
    folder = Path(shutil.copytree(tiny_out / name, tmp_path / name))
    places = {
        "gliner-span": ("gliner_config.json", "encoder_config"),
        "gliclass-before": ("config.json", "encoder_config"),
    }
    file, key = places.get(name, ("encoder_config/config.json", ""))
    config = json.loads((folder / file).read_text())
    (config[key] if key else config)["auto_map"] = {"AutoModel": "evil--modeling.Evil"}
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="auto_map"):
        load(folder)


def _changed(folder: Path, directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a folder with other weights."""
    copy = Path(shutil.copytree(folder, directory / folder.name))
    save_file(change(load_file(copy / "model.safetensors")), copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_library_is_imported_with_its_first_model_only() -> None:
    """A host pays for the libraries of extraction when it serves them, not before: nothing at the top imports them."""
    for path in (ROOT / "workers" / "host").rglob("*.py"):
        for line in ast.parse(path.read_text()).body:
            names = [one.name for one in line.names] if isinstance(line, ast.Import) else []
            names += [line.module or ""] if isinstance(line, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names}.isdisjoint({"gliner", "gliner2", "gliclass"}), path
