"""What a folder of texts and images says of its model: classes, tokenizer, image processor, length. No weights.

A folder is one of transformers, or one of sentence-transformers that holds a single ``CLIPModel``.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias

import msgspec
import numpy.typing as npt
from transformers import AutoTokenizer, CLIPImageProcessorPil, Siglip2ImageProcessorPil, SiglipImageProcessorPil

from config_db.spec import ModelSpec
from workers.host.families.dense_folder import Folder, refusal

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
PROCESSORS: Final[Mapping[str, Any]] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "Siglip2ImageProcessor": Siglip2ImageProcessorPil,
}
"""Image processors by the names that folders give them; they run on Pillow and numpy alone."""
_SETTINGS: Final = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of these models.

    Args:
        models: transformers' classes by ``model_type`` of config.json.
        text_inputs: token rows of one pass as the text side takes them.
        is_padded_full: every text costs a pass the model's full length, whatever its own.
    """

    models: Mapping[str, Any]
    text_inputs: Callable[[Sequence[Sequence[int]], "Kept"], Arrays]
    is_padded_full: bool


class Verdict(msgspec.Struct, frozen=True):
    """What the first load of a folder found out.

    ``architecture`` is equal for modules that differ in their weights alone; '' where they differ in more.
    """

    precision: str
    architecture: str


@dataclass(slots=True)
class Kept:
    """What outlives the eviction of a model: everything but its weights.

    ``shape`` is equal for folders that differ in their weights alone. ``longest``: tokens a text is cut to; ``patch``:
    side of one image patch, in pixels. ``verdict``: found by the first load. ``tokenising`` is held by whoever uses the
    tokenizer: two threads prepare.
    """

    folder: Folder
    model: Any
    shape: str
    tokenizer: Any
    processor: Any
    longest: int
    patch: int
    verdict: Verdict | None = None
    tokenising: Lock = field(default_factory=Lock)


def model_folder(files: Path) -> Path:
    """Where config.json lies: a sentence-transformers folder may hold its one module in a folder of its own."""
    modules = _json(files / "modules.json")
    if modules is None:
        return files
    places = [str(one.get("path") or "") for one in modules if str(one.get("type")).endswith("CLIPModel")]
    if len(modules) != 1 or len(places) != 1:
        raise refusal("its modules.json names more, or another, than one CLIPModel")
    return files / places[0]


def read_kept(spec: ModelSpec, files: Path, kind: Kind) -> Kept:
    """Everything of a folder but its weights."""
    place = model_folder(files)
    config = _json(place / "config.json") or {}
    model = kind.models.get(config.get("model_type", ""))
    if model is None:
        raise refusal(f"its model_type {config.get('model_type')!r} is not {' or '.join(kind.models)}")
    prompts = _json(files / "config_sentence_transformers.json") or {}
    folder = Folder(
        transformer=place,
        prompts={**(prompts.get("prompts") or {}), **spec.prompts},
        default_prompt=spec.default_prompt or prompts.get("default_prompt_name"),
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    full = model.config_class.from_dict(config)
    positions = full.text_config.max_position_embeddings
    return Kept(
        folder,
        model,
        shape=hashlib.sha256(msgspec.json.encode(config, order="deterministic")).hexdigest(),
        tokenizer=tokenizer,
        processor=_processor(place),
        longest=min(spec.max_length or positions, positions, tokenizer.model_max_length),
        patch=full.vision_config.patch_size,
    )


def _processor(place: Path) -> Any:
    """The folder's own image processor."""
    for name in _SETTINGS:
        settings = _json(place / name)
        if settings is not None:
            break
    else:
        raise refusal("it says nothing of how its images are made (preprocessor_config.json)")
    settings = settings.get("image_processor", settings)
    named = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    wanted = named.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if wanted not in PROCESSORS:
        raise refusal(f"its image processor {named!r} is none of {', '.join(PROCESSORS)}")
    return PROCESSORS[wanted].from_pretrained(place, local_files_only=True)


def _json(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise refusal(f"{path.name} is not JSON ({error})") from error
