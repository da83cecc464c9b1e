"""What a model needs to take adapters: a module to put them on, and a way to run another module like it."""

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from workers.host.families.protocol import Model

if TYPE_CHECKING:
    from workers.host.rack import Rack

T = TypeVar("T")


class Adaptable(ABC):
    """A model that takes adapters.

    What it prepares has ``parts``, one a request: its ``request``, and the ``rows`` of its texts in the micro-batch.
    Passes over a module with adapters say which of these texts they run (``workers.host.adapted.divided``).
    """

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """Has the linear layers that adapters may name."""

    @abstractmethod
    def on(self, module: torch.nn.Module) -> Model:
        """One that runs such a module with adapters, all else as this one does; the weights stay this one's."""

    @cached_property
    def rack(self) -> "Rack":
        """What its adapters hang on; peft is imported with the first."""
        from workers.host.rack import Rack

        return Rack(self.module, self.on)

    def close(self) -> None:
        """Let the adapters go."""
        if "rack" in self.__dict__:
            self.rack.close()


def like(one: T, **exchanged: Any) -> T:
    """An object that shares all with another but these attributes; what adapters hang on is the other's alone."""
    other = copy.copy(one)
    vars(other).pop("rack", None)
    vars(other).update(exchanged)
    return other
