"""Packed linear layers: the same numbers, taken and left without a trace."""

import pytest
import torch

from workers.host import linears
from workers.host.linears import pack, packed_bytes, unpack


def network(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(96, 192), torch.nn.GELU(), torch.nn.Linear(192, 96, bias=False), torch.nn.LayerNorm(96)
    )
    return layers.to(dtype)


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers this small may be no quicker packed; what is quicker is no matter of these tests."""
    monkeypatch.setattr(linears, "_GAIN", 0.0)


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (1, 5, 96), (3, 4, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_network_gives_the_same_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module, rows = network(dtype), torch.randn(*shape).to(dtype)
    with torch.inference_mode():
        plain = module(rows).double()
        assert pack(module)
        packed = module(rows).double()
    assert packed.shape == plain.shape
    least = 0.9999 if dtype is torch.bfloat16 else 1 - 1e-9
    assert torch.nn.functional.cosine_similarity(packed, plain, dim=-1).min() > least


@pytest.mark.usefixtures("pays")
def test_packed_layers_compute_with_what_was_packed_until_they_are_unpacked() -> None:
    module, rows = network(torch.float32), torch.randn(3, 96)
    with torch.inference_mode():
        before = module(rows)
        assert pack(module)
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.allclose(module[0](rows), module[0].forward(rows))
        assert module[0](rows).abs().max() > 0
        unpack(module)
        assert not torch.equal(module(rows), before)
        assert module[0](rows).abs().max() == 0


def test_what_is_no_linear_layer_of_torch_itself_is_left_alone() -> None:
    class Other(torch.nn.Linear):
        pass

    module = torch.nn.Sequential(Other(8, 8), torch.nn.Linear(8, 8).to(torch.float64))
    assert packed_bytes(module) == 0
    assert not pack(module)


def test_what_does_not_pay_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_GAIN", float("inf"))
    module = network(torch.float32)
    assert packed_bytes(module) == 2 * 96 * 192 * 4
    assert not pack(module)
    assert "forward" not in vars(module[0])


@pytest.mark.usefixtures("pays")
def test_a_layer_that_computes_something_else_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears._Packed, "__call__", lambda _, rows: torch.randn(len(rows), 192))
    assert not pack(network(torch.float32))


def test_torch_has_what_is_leaned_on() -> None:
    """Private to torch: when it moves, models run as before, only slower; this says so."""
    weight = torch.randn(64, 32)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    found = torch.ops.mkldnn._linear_pointwise(torch.ones(8, 32), packed, None, "none", [], "")
    assert torch.allclose(found, torch.ones(8, 32) @ weight.T, atol=1e-4)
