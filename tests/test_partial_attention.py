"""Attention to two parts of the keys, merged, is attention to all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from hf_prefix.attention.partial_attention import (
    Part,
    RowGroup,
    attend_by_blocks,
    attend_to_prefix,
    attend_to_prefixes,
    attend_to_tokens,
)
from hf_prefix.prefix.key_value import KeyValuePrefix

ROWS, HEADS, KV_HEADS, SIZE, PREFIX = 3, 4, 2, 8, 11
WITHOUT_CUDA = "needs a CUDA GPU, and torch sees none here"


def states(queries: int, keys: int, value_size: int = SIZE, **where: Any) -> list[Tensor]:
    """Return queries, keys and values of the tokens, and keys and values of the prefix."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (ROWS, HEADS, queries, SIZE),
        (ROWS, KV_HEADS, keys, SIZE),
        (ROWS, KV_HEADS, keys, value_size),
        (KV_HEADS, PREFIX, SIZE),
        (KV_HEADS, PREFIX, value_size),
    ]
    return [(2 * torch.randn(shape, generator=generator)).to(**where) for shape in shapes]


def wanted(tensors: list[Tensor], visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax attention to prefix and tokens as it is written down, in float64.

    Args:
        tensors: From `states`.
        visible: [batch or 1, heads or 1, query or 1, key], of the tokens.
        bias: What is added to scores of tokens.
    """
    query, key, value, prefix_key, prefix_value = (tensor.double() for tensor in tensors)
    keys = torch.cat([prefix_key.expand(ROWS, -1, -1, -1), key], dim=2).repeat_interleave(HEADS // KV_HEADS, dim=1)
    values = torch.cat([prefix_value.expand(ROWS, -1, -1, -1), value], dim=2)
    scores = query @ keys.transpose(-1, -2) * 0.3
    of_tokens = scores[..., prefix_key.shape[-2] :]
    if bias is not None:
        of_tokens += bias
    of_tokens.masked_fill_(~visible, -torch.inf)
    return scores.softmax(dim=-1) @ values.repeat_interleave(HEADS // KV_HEADS, dim=1)


def merged(tensors: list[Tensor], mask: Tensor | None, causal: bool = False) -> Tensor:
    """Return attention to prefix and tokens in two parts."""
    query, key, value, prefix_key, prefix_value = tensors
    tokens = attend_to_tokens(query, key, value, mask, causal, 0.3)
    return tokens.merged(attend_to_prefix(query, prefix_key, prefix_value, 0.3))


def padding(keys: int) -> Tensor:
    """Return which keys are no padding [batch, 1, 1, key]; in the last row all are."""
    return (torch.arange(keys) >= torch.tensor([0, 3, keys])[:, None])[:, None, None]


def check(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Check that both agree."""
    torch.testing.assert_close(got.cpu().double(), expected.cpu(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("value_size", [SIZE, 6])
@pytest.mark.parametrize("queries", [1, 5])
def test_masks_of_every_form(queries: int, value_size: int) -> None:
    """None, boolean, additive, by head; queries that see no token attend to the prefix alone."""
    tensors = states(queries, 7, value_size)
    visible = padding(7).expand(-1, -1, queries, -1)
    everything = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    check(merged(tensors, None), wanted(tensors, everything))
    check(merged(tensors, visible), wanted(tensors, visible))
    for hidden in (-torch.inf, torch.finfo(torch.float32).min):
        check(merged(tensors, torch.zeros(visible.shape).masked_fill(~visible, hidden)), wanted(tensors, visible))
    bias = torch.randn(ROWS, HEADS, queries, 7, generator=torch.Generator().manual_seed(1))
    check(merged(tensors, bias), wanted(tensors, everything, bias.double()))


def test_causal_without_a_mask_leaves_empty_slots_out() -> None:
    """As transformers' SDPA does it in the first pass with a static cache."""
    tensors = states(5, 9)
    visible = torch.ones(5, 9, dtype=torch.bool).tril()[None, None]
    check(merged(tensors, None, causal=True), wanted(tensors, visible))
    # One query sees all.
    tensors = states(1, 9)
    check(merged(tensors, None, causal=True), wanted(tensors, torch.ones(1, 1, 1, 9, dtype=torch.bool)))


def test_large_scores_are_merged_without_overflow() -> None:
    """Only the difference of the weights of both parts counts."""
    tensors = states(2, 6)
    tensors[0] *= 300
    expected = wanted(tensors, torch.ones(1, 1, 1, 6, dtype=torch.bool))
    assert merged(tensors, None).isfinite().all()
    check(merged(tensors, None), expected, tolerance=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float64, 1e-12)])
def test_other_types(dtype: torch.dtype, tolerance: float) -> None:
    """The result has the type of the queries."""
    tensors = states(4, 7, dtype=dtype)
    found = merged(tensors, padding(7).expand(-1, -1, 4, -1))
    assert found.dtype == dtype
    check(found, wanted(tensors, padding(7)), tolerance)


@pytest.mark.parametrize("queries", [1, 5])
def test_rows_with_prefixes_of_their_own(queries: int) -> None:
    """Prefixes of different lengths, and a row that has none; where it sees no token either, it gets zeros."""
    tensors = states(queries, 7)
    query, key, value, prefix_key, prefix_value = tensors
    visible = padding(7).expand(-1, -1, queries, -1).clone()
    visible[1, :, 0] = False
    short, whole = KeyValuePrefix(prefix_key[:, -4:], prefix_value[:, -4:]), KeyValuePrefix(prefix_key, prefix_value)
    groups = [RowGroup(torch.tensor([2]), short), RowGroup(torch.tensor([0]), whole)]
    found = attend_to_tokens(query, key, value, visible, False, 0.3).merged(attend_to_prefixes(query, groups, 0.3))
    check(found[:1], wanted(tensors, visible)[:1])
    check(found[2:], wanted([*tensors[:3], short.key, short.value], visible)[2:])
    alone = wanted([*tensors[:3], prefix_key[:, :0], prefix_value[:, :0]], visible)[1:2]
    check(found[1:2], alone.nan_to_num(0))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("queries", [1, 5])
def test_block_masks(queries: int) -> None:
    """By FlexAttention itself, as on GPUs, and by what its mask says, as on the CPU."""
    tensors = states(queries, 7)
    starts = torch.tensor([0, 3, 7])
    mask = create_block_mask(lambda row, head, query, key: key >= starts[row], ROWS, None, queries, 7, "cpu")
    expected = wanted(tensors, padding(7))
    check(merged(tensors, mask), expected)
    query, key, value, prefix_key, prefix_value = tensors
    with torch.compiler.set_stance("force_eager"):
        part: Part = attend_by_blocks(query, key, value, mask, 0.3)
    check(part.merged(attend_to_prefix(query, prefix_key, prefix_value, 0.3)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT_CUDA)
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_on_a_gpu(queries: int) -> None:
    """The kernel for GPUs tells the same."""
    tensors = states(queries, 19, device="cuda")
    visible = padding(19).expand(-1, -1, queries, -1)
    check(merged(tensors, visible.cuda()), wanted(tensors, visible.cuda()))
    check(merged(tensors, None), wanted(tensors, torch.ones(1, 1, 1, 19, dtype=torch.bool).cuda()))
