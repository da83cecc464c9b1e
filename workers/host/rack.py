"""The adapters that hang on one loaded base: a second module beside it that shares its weights and has peft's layers.

The base's own module is never touched, so that what it answers without an adapter cannot change. Adapters are hung and
taken off in the loader's thread while the compute thread runs; a lock keeps the two apart for the milliseconds of it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final, cast

import torch
from peft import PeftModel, set_peft_model_state_dict

from common.logs import get_logger
from workers.host.adapted import AdaptedLinear, UndividedError
from workers.host.adapted_model import AdaptedModel
from workers.host.adapter_files import AdapterFiles, read_adapter, refusal
from workers.host.families.protocol import Model

log = get_logger("host")

TOKENS_FIRST: Final = frozenset(("fsmt", "led", "longformer", "xlnet"))
"""transformers' types with layers that are given tokens before rows: as many of both could not be told apart."""


class Rack:
    """Adapters by the digest of their source, which is the name that peft knows them by.

    Args:
        module: the base's; its linear layers are what adapters can be put on.
        on: makes the model that runs a module with adapters as the base runs its own.

    Attributes:
        mixes: whether that model runs requests for different adapters in one forward pass; so until found otherwise,
            but for types that are known not to.
    """

    def __init__(self, module: torch.nn.Module, on: Callable[[torch.nn.Module], Model]) -> None:
        self.mixes = getattr(getattr(module, "config", None), "model_type", None) not in TOKENS_FIRST
        self.is_closed = False
        self._lock = Lock()
        self._base: torch.nn.Module | None = module
        self._on = on
        self._peft: Any = None
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """Runs requests that name an adapter of the rack; there is one as long as an adapter hangs."""
        assert self._model is not None  # whoever asks holds a lease on an adapter
        return self._model

    def read(self, folder: Path) -> AdapterFiles:
        """Read an adapter that fits the base; ModelLoadError if it does not."""
        assert self._base is not None  # the base is leased
        return read_adapter(folder, self._base)

    def bytes_of(self, files: AdapterFiles) -> int:
        """Device bytes that an adapter is going to hold."""
        layers = ((self._weight(files.module_of(key)), tensor) for key, tensor in files.tensors.items())
        return sum(tensor.numel() * weight.element_size() for weight, tensor in layers)

    def hang(self, name: str, files: AdapterFiles) -> None:
        """Make an adapter routable.

        Raises:
            ModelLoadError: peft does not take it.
        """
        with self._lock:
            try:
                self._hang(name, files)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                self._take(name)
                raise refusal(f"peft does not take it ({str(error)[:300]})") from error

    def take(self, name: str) -> None:
        """Take an adapter off."""
        with self._lock:
            self._take(name)

    def close(self) -> None:
        """The base leaves, and all adapters with it."""
        self.is_closed = True
        self._peft = self._model = self._base = None

    def _hang(self, name: str, files: AdapterFiles) -> None:
        assert self._base is not None  # the base is leased
        config = files.lora_config()
        config._register_custom_module({torch.nn.Linear: AdaptedLinear})  # noqa: SLF001 - peft documents it so
        if self._peft is None:
            shared = {id(one): one for one in (*self._base.parameters(), *self._base.buffers())}
            module = copy.deepcopy(self._base, shared)
            self._peft = PeftModel(
                module, config, adapter_name=name, low_cpu_mem_usage=True, autocast_adapter_dtype=False
            )
            self._model = AdaptedModel(self._on(module), self._running)
        else:
            self._peft.add_adapter(name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        tensors = {key: tensor.to(self._weight(files.module_of(key))) for key, tensor in files.tensors.items()}
        set_peft_model_state_dict(self._peft, tensors, adapter_name=name, low_cpu_mem_usage=True)
        self._check_whole(name, len(tensors))
        self._peft.base_model.set_adapter([])  # which is active for peft does not matter: passes say whose they are

    @contextmanager
    def _running(self, owners: Sequence[str]) -> Iterator[None]:
        """Keep what hangs as it is while texts of these adapters run. What cannot be mixed is not tried again.

        Raises:
            UndividedError: it is of several adapters, and that cannot be, as was found by a run before this.
        """
        with self._lock:
            if not self.mixes and len(set(owners)) > 1:
                raise UndividedError("adapters of this base run one at a time")
            try:
                yield
            except UndividedError as error:
                log.warning("adapters_run_apart", model=type(self._base).__name__, reason=str(error))
                self.mixes = False
                raise

    def _weight(self, module: str) -> torch.Tensor:
        """The weight of a layer of the base: what its adapters are to be like."""
        assert self._base is not None  # the base is leased
        return cast("torch.nn.Linear", self._base.get_submodule(module)).weight

    def _check_whole(self, name: str, count: int) -> None:
        """ValueError unless what hangs under this name is all that the file held and no more."""
        hung = [one for key, one in self._peft.named_parameters() if f".{name}." in f"{key}."]
        if len(hung) != count or any(one.is_meta for one in hung):
            raise ValueError(f"of {count} tensors {len(hung)} found a place")
        for one in hung:
            one.requires_grad_(requires_grad=False)

    def _take(self, name: str) -> None:
        if self._peft is None or name not in self._peft.peft_config:
            return
        if len(self._peft.peft_config) == 1:
            self._peft = self._model = None
        else:
            self._peft.delete_adapter(name)
