"""Padding-free attention against the formula over each text alone."""

import pytest
import torch

from workers.host.attention import layout, packed_attention
from workers.host.packing import Group

HEADS, WIDTH = 4, 16
MIXED = (Group(0, 3, 1), Group(3, 2, 7), Group(17, 9, 20), Group(197, 1, 64), Group(261, 2, 100))
FEW = (Group(0, 1, 5),)
LONG = (Group(0, 1, 5), Group(5, 30, 30), Group(905, 1, 31), Group(936, 1, 600))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, window: int | None
) -> torch.Tensor:
    """One text ``[heads, tokens, width]``, written down as the formula says, in float64."""
    places = torch.arange(query.shape[1])
    distance = places[None] - places[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool) if not causal else distance <= 0
    if window is not None:
        seen &= distance.abs() < window
    scores = query.double() @ key.double().transpose(1, 2) / WIDTH**0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.double()


@pytest.mark.parametrize("kind", TOLERANCE, ids=str)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 5), (True, 5)])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("groups", [MIXED, FEW, LONG], ids=["mixed", "few", "long"])
def test_a_text_sees_itself_and_nothing_of_its_neighbours(
    kind: torch.dtype, causal: bool, window: int | None, key_heads: int, groups: tuple[Group, ...]
) -> None:
    dice, tokens = torch.Generator().manual_seed(7), groups[-1].end
    query = torch.randn(1, HEADS, tokens, WIDTH, generator=dice).to(kind)
    key, value = (torch.randn(1, key_heads, tokens, WIDTH, generator=dice).to(kind) for _ in range(2))
    with layout(groups):
        mixed, _ = packed_attention(
            torch.nn.Identity(), query, key, value, None, is_causal=causal, sliding_window=window
        )
    whole_key, whole_value = (part.repeat_interleave(HEADS // key_heads, dim=1)[0] for part in (key, value))
    for group in groups:
        for start in range(group.start, group.end, group.length):
            text = slice(start, start + group.length)
            expected = alone(query[0, :, text], whole_key[:, text], whole_value[:, text], causal=causal, window=window)
            torch.testing.assert_close(
                mixed[0, text].transpose(0, 1).double(), expected, atol=TOLERANCE[kind], rtol=TOLERANCE[kind]
            )


@pytest.mark.parametrize("kind", TOLERANCE, ids=str)
def test_numbers_that_are_none_stay_in_their_text(kind: torch.dtype) -> None:
    one = torch.randn(1, HEADS, MIXED[-1].end, WIDTH, generator=torch.Generator().manual_seed(7)).to(kind)
    broken = one.clone()
    broken[0, :, 0] = torch.nan  # a text of one token, the first of its block
    with layout(MIXED):
        whole, _ = packed_attention(torch.nn.Identity(), one, one, one, None)
    with layout(MIXED):
        mixed, _ = packed_attention(torch.nn.Identity(), broken, broken, broken, None)
    assert mixed[0, 0].isnan().all()
    assert torch.equal(mixed[0, 1:], whole[0, 1:])


def test_what_changes_scores_in_an_unknown_way_is_refused() -> None:
    one = torch.zeros(1, HEADS, 4, WIDTH)
    with layout((Group(0, 1, 4),)), pytest.raises(NotImplementedError, match="position_bias"):
        packed_attention(torch.nn.Identity(), one, one, one, None, position_bias=one)
