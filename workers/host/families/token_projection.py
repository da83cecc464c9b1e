"""Linear layers over each token's state, as late-interaction encoders have them, in float32."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from workers.host.families.dense_folder import read_json, refusal

ACTIVATIONS: Final = {
    "Identity": torch.nn.Identity,
    "Tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
    "GELU": torch.nn.GELU,
    "Sigmoid": torch.nn.Sigmoid,
    "SiLU": torch.nn.SiLU,
}


class Projection(torch.nn.Module):
    """One layer: ``activation(linear(x))``, and what stands beside it if it has a residual."""

    def __init__(self, linear: torch.nn.Linear, activation: torch.nn.Module, residual: torch.nn.Module | None) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation
        self.residual = residual

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.activation(self.linear(states))
        return projected if self.residual is None else projected + self.residual(states)


def read_layers(folders: Sequence[Path]) -> torch.nn.Sequential:
    """The layers of these folders, in order; ModelLoadError for one that cannot be read rightly."""
    return torch.nn.Sequential(*(_layer(folder) for folder in folders)).requires_grad_(requires_grad=False)


def read_inner_layer(encoder: Path, name: str = "linear.weight") -> torch.nn.Sequential:
    """The projection that stands among the weights of the encoder itself; ModelLoadError if none does."""
    for path in sorted(encoder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - it is no mapping
                linear = linear_of({"weight": file.get_tensor(name)})
                return torch.nn.Sequential(linear).requires_grad_(requires_grad=False)
    raise refusal(f"its safetensors weights hold no projection of the tokens ({name})")


def linear_of(weights: Mapping[str, torch.Tensor]) -> torch.nn.Linear:
    """A linear layer of these weights, in float32."""
    out_features, in_features = weights["weight"].shape
    linear = torch.nn.Linear(in_features, out_features, bias="bias" in weights)
    linear.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return linear


def _layer(folder: Path) -> Projection:
    config = read_json(folder / "config.json") or {}
    path = folder / "model.safetensors"
    if not path.exists():
        raise refusal(f"its layer {folder.name} holds no safetensors weights; other formats are not loaded")
    weights = load_file(path)
    linear = linear_of(_under("linear.", weights))
    activation = ACTIVATIONS.get(str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2])
    if activation is None:
        raise refusal(f"the activation {config.get('activation_function')!r} of its layer {folder.name} is not known")
    return Projection(linear, activation(), _residual(config, weights))


def _residual(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> torch.nn.Module | None:
    if not config.get("use_residual"):
        return None
    beside = _under("residual.", weights)
    return linear_of(beside) if beside else torch.nn.Identity()


def _under(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
