"""How text encoders come onto the device: out of a kept copy, into a skeleton, or through transformers.

The first load of a folder goes through transformers and is tried (``trial``). What was found is kept, here for as long
as the host lives and in a note beside the copy for others, with a skeleton of the module: so a model that was evicted
comes back in milliseconds, and so does one of an architecture that was tried with other weights.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol

import msgspec
import torch
from transformers import AutoModel

from config_db.spec import ModelSpec, WeightsFormat
from workers.host import linears, precision
from workers.host.encoder import Layout, cast, load_module
from workers.host.families.dense_folder import refusal
from workers.host.families.flat_copies import copy_name, find_copy, keep_copy
from workers.host.families.protocol import Device
from workers.host.families.text_folder import content_key
from workers.host.families.trial import Run, Trial
from workers.host.flat import FlatWeights
from workers.host.skeletons import Skeletons, blank_module, hang_in, has_own_buffers, revive, weights_of

_NOT_SHAPE: Final = frozenset(("_name_or_path", "transformers_version", "torch_dtype", "dtype"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the first load of a folder found out.

    ``architecture`` is equal for modules that differ in their weights alone; '' where they differ in more. ``prefix``
    stands before the names in the files.
    """

    layout: Layout
    precision: str
    architecture: str
    prefix: str


class Kept(Protocol):
    """What a family keeps of a folder when its model leaves."""

    verdict: Verdict | None


class Opened:
    """A module on its device. Owns its weights, which may be exchanged while it runs, until it is closed."""

    def __init__(self, module: torch.nn.Module, architecture: str, device: Device, skeletons: Skeletons) -> None:
        self.module = module
        self._architecture = architecture
        self._device = device
        self._skeletons = skeletons
        self._closing = Lock()

    @property
    def is_on_cpu(self) -> bool:
        """Whether its weights are in host memory, and it is not closed."""
        return self.module is not None and self._device.kind == "cpu"

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Its parameters as they run, by name; None once it is closed."""
        with self._closing:
            return None if self.module is None else weights_of(self.module)

    def adopt(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use the same numbers from elsewhere, also while it runs: each tensor is exchanged by one store."""
        with self._closing:
            if self.module is not None:
                hang_in(self.module, weights)

    def close(self) -> None:
        """Let the weights go and keep the skeleton."""
        with self._closing:
            module, self.module = self.module, None  # type: ignore[assignment]  # it runs no more
        linears.unpack(module)
        self._skeletons.give_back(self._architecture, module)


@dataclass(frozen=True, slots=True)
class Opening:
    """One folder to open: where its weights lie, in which formats they are read, and how it is tried."""

    spec: ModelSpec
    files: Path
    weights: Path
    run: Run
    formats: Sequence[WeightsFormat] = ("safetensors",)

    @property
    def has_safetensors(self) -> bool:
        """Whether its weights can be mapped."""
        return any(self.weights.glob("*.safetensors"))


def whole(module: torch.nn.Module) -> torch.nn.Module:
    """A module that is a bare encoder."""
    return module


class Openings:
    """Opens the models of one family in one host. Owns the skeletons; used by the loader thread.

    Args:
        auto: transformers' class to load with.
        base: the bare encoder in what it loads.
    """

    def __init__(self, auto: Any = AutoModel, base: Callable[[torch.nn.Module], torch.nn.Module] = whole) -> None:
        self._auto = auto
        self._base = base
        self._skeletons = Skeletons()
        self._layouts: dict[str, Layout] = {}

    def open(self, folder: Opening, kept: Kept, device: Device) -> tuple[Opened, Layout]:
        """Bring a folder's module onto the device, with its layout; the first time also find out how it runs best."""
        spec, name = folder.spec, copy_name(content_key(folder.spec, folder.files), device)
        flat = find_copy(name, device, keep=spec.placement.tier == "memory")
        if flat is not None and kept.verdict is None:
            kept.verdict = msgspec.json.decode(flat.note, type=Verdict)
        module = self._revived(folder, kept.verdict, flat)
        is_copied = flat is not None and module is not None
        if module is None and kept.verdict is not None:
            module = cast(self._loaded(folder), precision.DTYPES[kept.verdict.precision])
        elif module is None:
            module, kept.verdict = self._judged(folder, device)
        assert kept.verdict is not None  # it was known, or has been found
        self._layouts.setdefault(kept.verdict.architecture, kept.verdict.layout)
        opened = Opened(module.to(device.name), kept.verdict.architecture, device, self._skeletons)
        if device.copies is not None and not is_copied:
            keep_copy(device.copies, name, opened, kept.verdict)
        return opened, kept.verdict.layout

    def _revived(self, folder: Opening, verdict: Verdict | None, flat: FlatWeights | None) -> torch.nn.Module | None:
        """Hang kept or mapped weights into a skeleton; None before the first load, and where they do not fit."""
        if verdict is None or not verdict.architecture or not (folder.has_safetensors or (flat and flat.bytes)):
            return None
        module = self._skeletons.take(verdict.architecture) or blank_module(folder.weights, self._auto)
        dtype = precision.DTYPES[verdict.precision]
        return revive(module, folder.weights, dtype, flat=flat, prefix=verdict.prefix)

    def _judged(self, folder: Opening, device: Device) -> tuple[torch.nn.Module, Verdict]:
        """Load a folder for the first time."""
        architecture = _architecture(folder.weights)
        layout = self._layouts.get(architecture)
        alike = self._alike(folder, architecture) if layout is not None else None
        if layout is not None and alike is not None:
            judged, prefix = self._trial(folder, device).judge_alike(alike, layout), self._prefix(alike)
        else:
            loaded = self._loaded(folder)
            prefix, architecture = self._prefix(loaded), "" if has_own_buffers(loaded) else architecture
            judged = self._trial(folder, device).judge(loaded)
            self._skeletons.learn(architecture, judged.module)
        return judged.module, Verdict(judged.layout, judged.precision, architecture, prefix)

    def _alike(self, folder: Opening, architecture: str) -> torch.nn.Module | None:
        """A skeleton of the architecture with the folder's weights in float32; None if there is none they fit in."""
        module = self._skeletons.take(architecture) if folder.has_safetensors else None
        return None if module is None else revive(module, folder.weights, torch.float32, prefix=self._prefix(module))

    def _prefix(self, module: torch.nn.Module) -> str:
        """What stands before the names of an encoder's weights where the files are those of a model with a head."""
        return str(getattr(module, "base_model_prefix", "")) if self._base(module) is module else ""

    def _trial(self, folder: Opening, device: Device) -> Trial:
        return Trial(folder.spec, device, self._base, folder.run, restore=lambda _: self._loaded(folder))

    def _loaded(self, folder: Opening) -> torch.nn.Module:
        return load_module(folder.weights, self._auto, formats=folder.formats)


def _architecture(folder: Path) -> str:
    """Equal for folders that differ in their weights alone."""
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise refusal(f"its config.json cannot be read ({error})") from error
    shape = {name: value for name, value in config.items() if name not in _NOT_SHAPE}
    return hashlib.sha256(msgspec.json.encode(shape, order="deterministic")).hexdigest()
