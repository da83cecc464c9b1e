"""Encoders of texts and images into one space: what CLIP, SigLIP and their kin have in common.

Tokenising, decoding and resizing happen in ``prepare``; a micro-batch may mix texts and images of any requests. Passes
hold texts or images, never both. The module, its projections and its image processor are those of transformers; what a
kind does of its own is in ``Kind`` (``clip``, ``siglip``), what a folder says in ``image_text_folder``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import torch
from PIL import Image

from common.errors import FarmError, RequestError
from common.logs import get_logger
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host import devices, precision
from workers.host.encoder import bytes_of, cast
from workers.host.families import results
from workers.host.families.dense_prompts import wording
from workers.host.families.flat_copies import copy_name, find_copy, keep_copy
from workers.host.families.heads import check_covered, check_safetensors
from workers.host.families.image_text_folder import Arrays, Kept, Kind, Verdict, model_folder, read_kept
from workers.host.families.kept_folders import Recent, estimate_bytes
from workers.host.families.opening import Opened
from workers.host.families.protocol import Device
from workers.host.families.request_texts import (
    Part,
    check_flags,
    check_operation,
    not_finite,
    output_dtype,
    wanted_outputs,
)
from workers.host.families.text_folder import content_key
from workers.host.flat import FlatWeights
from workers.host.images import image_of
from workers.host.packing import plan
from workers.host.skeletons import Skeletons, blank_module, has_own_buffers, revive

log = get_logger("host")

_CHECK_SIZES: Final = ((64, 64), (320, 200), (97, 311))


@dataclass(slots=True)
class Inputs:
    """The texts, as token ids, and images, as pixels, of a micro-batch, each with its row."""

    texts: list[list[int]] = field(default_factory=list)
    text_rows: list[int] = field(default_factory=list)
    images: list[Arrays] = field(default_factory=list)
    image_rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PreparedItems:
    """A micro-batch whose texts are tokenised and whose images are pixels of the model's size."""

    parts: tuple[Part, ...]
    inputs: Inputs
    request_tokens: tuple[int, ...]


class ImageTextModel:
    """One loaded model."""

    def __init__(self, spec: ModelSpec, kind: Kind, kept: Kept, opened: Opened, device: Device) -> None:
        self._spec = spec
        self._kind = kind
        self._kept = kept
        self._opened = opened
        self._module = opened.module
        self._device = device.name
        self._pass_tokens = min(spec.limits.max_batch_tokens or device.pass_tokens, device.pass_tokens)
        self.bytes = bytes_of(opened.module)

    def prepare(self, operation: str, requests: Sequence[Request]) -> PreparedItems:
        """Check every request, decode and resize its images, and tokenise all texts in one call."""
        check_operation(operation, self._spec, ("encode",))
        parts: list[Part] = []
        read: list[str | Arrays] = []
        for request in requests:
            start = len(read)
            try:
                read += self._read(request)
                parts.append(Part(request, slice(start, len(read))))
            except RequestError as error:
                parts.append(Part(request, slice(start, start), error=error))
        inputs = self.inputs(read)
        tokens = np.zeros(len(read), dtype=np.int64)
        tokens[inputs.text_rows] = [len(ids) for ids in inputs.texts]
        tokens[inputs.image_rows] = [self._patches(one) for one in inputs.images]
        return PreparedItems(tuple(parts), inputs, tuple(int(tokens[part.rows].sum()) for part in parts))

    def run(self, prepared: PreparedItems) -> torch.Tensor:
        """Vectors ``[N, D]`` of all items, float32 on CPU, in the order of the micro-batch."""
        return self.vectors(prepared.inputs)

    def finish(self, prepared: PreparedItems, raw: torch.Tensor) -> list[bytes | FarmError]:
        """Normalise and write each request's vectors as it asked for them."""
        plain, unit = raw.numpy(), torch.nn.functional.normalize(raw, dim=-1).numpy()
        finite = torch.isfinite(raw).all(dim=-1).numpy()
        answers: list[bytes | FarmError] = []
        for part in prepared.parts:
            if part.error is not None:
                answers.append(part.error)
            elif not finite[part.rows].all():
                answers.append(not_finite(self._spec))
            else:
                wanted = part.request.options.get("normalize")
                rows = unit if (self._spec.normalize if wanted is None else wanted) else plain
                answers.append(results.dense_items(part.request.items, rows[part.rows], output_dtype(part.request)))
        return answers

    def close(self) -> None:
        """Let the weights go and keep the skeleton."""
        self._module = None  # type: ignore[assignment]  # a closed model runs no more
        self._opened.close()

    def inputs(self, read: Sequence[str | Arrays]) -> Inputs:
        """Worded texts, tokenised together, and pixels, each with its place in ``read``."""
        texts = {row: one for row, one in enumerate(read) if isinstance(one, str)}
        images = {row: one for row, one in enumerate(read) if not isinstance(one, str)}
        return Inputs(self._tokenise(list(texts.values())), list(texts), list(images.values()), list(images))

    def pixels(self, image: Image.Image) -> Arrays:
        """An image as the model's own processor makes it."""
        made = self._kept.processor(images=[image], return_tensors="np")
        return {name: np.asarray(array)[0] for name, array in made.items()}

    def vectors(self, inputs: Inputs) -> torch.Tensor:
        """Projected features ``[N, D]``, not normalised, each in its row."""
        rows: list[int] = []
        found: list[torch.Tensor] = []
        with torch.inference_mode():
            for places, arrays in self._text_passes(inputs.texts):
                rows += [inputs.text_rows[place] for place in places]
                found.append(self._module.get_text_features(**self._tensors(arrays)).pooler_output)  # type: ignore[operator]
            for places, arrays in self._image_passes(inputs.images):
                rows += [inputs.image_rows[place] for place in places]
                found.append(self._module.get_image_features(**self._tensors(arrays)).pooler_output)  # type: ignore[operator]
            if not found:
                return torch.empty(0, 0)
            features = torch.cat(found).float().cpu()
            ordered = torch.empty_like(features)
            ordered[torch.tensor(rows)] = features
        return ordered

    def _text_passes(self, texts: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], Arrays]]:
        costs = [self._kept.longest if self._kind.is_padded_full else max(1, len(ids)) for ids in texts]
        passes = plan(costs, pass_tokens=self._pass_tokens, padded=True)
        return [(one.rows, self._kind.text_inputs([texts[row] for row in one.rows], self._kept)) for one in passes]

    def _image_passes(self, images: Sequence[Arrays]) -> list[tuple[tuple[int, ...], Arrays]]:
        passes = plan([self._patches(one) for one in images], pass_tokens=self._pass_tokens, padded=True)
        return [
            (one.rows, {name: np.stack([images[row][name] for row in one.rows]) for name in images[one.rows[0]]})
            for one in passes
        ]

    def _tensors(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}

    def _patches(self, pixels: Arrays) -> int:
        """How many patches the model sees of an image."""
        shape = pixels["pixel_values"].shape
        if len(shape) == 2:  # cut into patches already
            return int(shape[0])
        return int(shape[-2] // self._kept.patch) * int(shape[-1] // self._kept.patch)

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        kept = self._kept
        with kept.tokenising:
            made = kept.tokenizer(
                texts, truncation=True, max_length=kept.longest, padding=False, return_attention_mask=False
            )
        return list(made["input_ids"])

    def _read(self, request: Request) -> list[str | Arrays]:
        """A request's items: texts as they are worded, and pixels."""
        wanted_outputs(request, self._spec)
        check_flags(request, "normalize")
        output_dtype(request)
        word = wording(request, self._spec, self._kept.folder)
        errors: dict[int, RequestError] = {}
        found: list[str | Arrays] = []
        for place, item in enumerate(request.items):
            try:
                found.append(self._read_item(item, place, word))
            except RequestError as error:
                errors[place] = error
        if errors:
            raise results.item_errors(errors)
        return found

    def _read_item(self, item: Any, place: int, word: Callable[[str], str]) -> str | Arrays:
        text = item.get("text") if isinstance(item, dict) else item
        image = image_of(item, place)
        if image is None:
            if not isinstance(text, str):
                raise RequestError("an item has a text, as a string, or an image", param=f"items[{place}]")
            return word(text)
        if text is not None:
            raise RequestError("an item is a text or an image, not both", param=f"items[{place}].images")
        return self.pixels(image)


ModelMaker: TypeAlias = Callable[[torch.nn.Module], ImageTextModel]


class ImageTextFamily:
    """Loads models of one kind, and remembers of each folder what it costs time to find out."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._kept = Recent(partial(read_kept, kind=kind))
        self._skeletons = Skeletons()

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """Device bytes, as far as the weight files tell."""
        return estimate_bytes(self._kept, spec, files, model_folder(files).glob("*.safetensors"))

    def load(self, spec: ModelSpec, files: Path, device: Device) -> ImageTextModel:
        """Load the model of a folder; the first time also try it, and find out how precise it must be."""
        kept = self._kept.recall(spec, files)
        name = copy_name(content_key(spec, files), device)
        flat = find_copy(name, device, keep=spec.placement.tier == "memory")
        if flat is not None and kept.verdict is None:
            kept.verdict = msgspec.json.decode(flat.note, type=Verdict)

        def opened(module: torch.nn.Module) -> Opened:
            architecture = "" if kept.verdict is None else kept.verdict.architecture
            return Opened(module.to(device.name), architecture, device, self._skeletons)

        def model(module: torch.nn.Module) -> ImageTextModel:
            return ImageTextModel(spec, self._kind, kept, opened(module), device)

        module = self._revive(kept, kept.verdict, flat)
        is_copied = flat is not None and module is not None
        there = opened(module if module is not None else self._load_and_judge(spec, kept, device, model))
        if device.copies is not None and kept.verdict is not None and not is_copied:
            keep_copy(device.copies, name, there, kept.verdict)
        return ImageTextModel(spec, self._kind, kept, there, device)

    def _revive(self, kept: Kept, verdict: Verdict | None, flat: FlatWeights | None) -> torch.nn.Module | None:
        """Hang kept or mapped weights into a skeleton; None before the first load, and where they do not fit."""
        if verdict is None or not verdict.architecture:
            return None
        module = self._skeletons.take(verdict.architecture) or blank_module(kept.folder.transformer)
        return revive(module, kept.folder.transformer, precision.DTYPES[verdict.precision], flat=flat)

    def _load_and_judge(self, spec: ModelSpec, kept: Kept, device: Device, model: ModelMaker) -> torch.nn.Module:
        """Load through transformers and, unless that is known, find out what only a run can tell."""
        module = _load_module(kept)
        chosen = kept.verdict.precision if kept.verdict is not None else _judge(spec, kept, module, device, model)
        architecture = "" if has_own_buffers(module) else f"{kept.model.__name__}:{chosen}:{kept.shape}"
        kept.verdict = Verdict(chosen, architecture)
        return cast(module, precision.DTYPES[chosen])


def _judge(spec: ModelSpec, kept: Kept, module: torch.nn.Module, device: Device, model: ModelMaker) -> str:
    """The quickest precision whose vectors of check texts and images are those of float32."""
    *tried, last = precision.candidates(spec.precision, device)
    texts, images = list(precision.CHECK_TEXTS), _check_images()
    if not tried:  # one of each shows whether the files fit each other
        texts, images = texts[:1], images[:1]
    inputs = model(module).inputs([*texts, *(model(module).pixels(image) for image in images)])
    plain = model(module).vectors(inputs)
    for name in tried:
        cosine = _compare(model(cast(module, precision.DTYPES[name])), inputs, plain)
        if cosine >= precision.SAME:
            log.info("model_judged", model=spec.id, precision=name)
            return name
        log.warning("precision_refused", model=spec.id, precision=name, cosine=round(cosine, 6))
        cast(module, torch.float32).load_state_dict(_load_module(kept).state_dict())
    return last


def _compare(model: ImageTextModel, inputs: Inputs, plain: torch.Tensor) -> float:
    try:
        return precision.worst_cosine(model.vectors(inputs), plain)
    except Exception as error:
        if devices.is_out_of_memory(error) or devices.is_device_lost(error):
            raise  # says nothing about the precision
        return -1.0


def _check_images() -> list[Image.Image]:
    """Pictures of gradients and noise, the same in every process."""
    noise = np.random.default_rng(0)
    images = []
    for width, height in _CHECK_SIZES:
        across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        grain = noise.uniform(0, 255, (height, width))
        images.append(Image.fromarray(np.stack([across, down, grain], axis=-1).astype(np.uint8)))
    return images


def _load_module(kept: Kept) -> torch.nn.Module:
    """Load through transformers, in float32, without running code from the folder."""
    check_safetensors(kept.folder.transformer)
    module, told = kept.model.from_pretrained(
        kept.folder.transformer,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    check_covered(told["missing_keys"])
    return module.requires_grad_(requires_grad=False).eval()  # type: ignore[no-any-return]  # transformers is untyped
