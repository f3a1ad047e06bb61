"""FlexAttention on a forest: the mask and the numbers of plain attention, and what happens where it doesn't work.

Its backward pass needs CUDA; here the forward pass runs uncompiled, and the masks are compared whole.
"""

from __future__ import annotations

import pytest
import torch

from rlhf.models import attention, flex
from rlhf.models.attention import TreeAttention, attend
from rlhf.models.flex import block_mask, fused_attention, works_on
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.masks import visible


def forest(*lengths: int) -> Forest:
    """A conversation of several turns with branches at two depths, and a tree of one segment, `lengths` times over."""
    parts = [torch.zeros(n, dtype=torch.long) for n in lengths]
    return Forest([Tree([*parts[:5]], [-1, 0, 1, 1, 0]), Tree.of(parts[5])])


def operands(num: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num)
    return [torch.randn(1, h, num, 16, generator=generator) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_its_numbers_are_those_of_plain_attention(heads, kv_heads, window, softcap):
    """Also where the tokens fill no whole block of 128."""
    packed = forest(60, 30, 17, 41, 23, 50)
    query, key, value = operands(packed.num_tokens, heads, kv_heads)
    with torch.no_grad():
        found = fused_attention(packed, query, key, value, window=window, scaling=0.3, softcap=softcap)
        mask = torch.zeros(packed.num_tokens, packed.num_tokens).masked_fill(~visible(packed, window), float("-inf"))
        expected = attend(query, key, value, mask, scaling=0.3, softcap=softcap).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_blocks_in_which_nothing_is_visible_are_left_out(window):
    packed = forest(150, 130, 260, 10, 140, 300)
    mask = block_mask(packed, window)
    seen = visible(packed, window)
    num = -(-packed.num_tokens // 128)
    padded = torch.zeros(num * 128, num * 128, dtype=torch.bool)
    padded[: packed.num_tokens, : packed.num_tokens] = seen
    blocks = padded.view(num, 128, num, 128).permute(0, 2, 1, 3).flatten(2).any(-1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)
    assert block_mask(packed, window) is mask


def test_where_the_kernel_fails_attention_runs_in_blocks(monkeypatch):
    """As on a machine without a compiler: said once, and the numbers are the same."""
    monkeypatch.setattr(flex, "_difference", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")))
    works_on.cache_clear()
    with pytest.warns(UserWarning, match=r"FlexAttention fails \(RuntimeError: no compiler\) on cpu"):
        assert not works_on(torch.device("cpu"), torch.float32, 16)
    monkeypatch.setattr(flex, "_difference", lambda *_: 0.5)
    works_on.cache_clear()
    with pytest.warns(UserWarning, match=r"differs from plain attention by 5.0e-01"):
        assert not works_on(torch.device("cpu"), torch.float32, 16)
    monkeypatch.setattr(flex, "_difference", lambda *_: 1e-3)
    works_on.cache_clear()
    assert works_on(torch.device("cpu"), torch.float32, 16)
    works_on.cache_clear()


@pytest.mark.parametrize("works", [False, True])
def test_the_plan_takes_it_off_the_cpu_where_it_works(works, monkeypatch):
    """On a device that claims to be none of ours: the fused kernel, or the blocks; never with dropout."""
    packed, calls = forest(9, 5, 3, 4, 6, 8), []
    query, key, value = operands(packed.num_tokens, 4, 2)
    monkeypatch.setattr(attention, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(attention, "works_on", lambda *_: works)
    fused = attention.fused_attention
    monkeypatch.setattr(
        attention, "fused_attention", lambda *args, **options: calls.append(1) or fused(*args, **options)
    )
    options = {"scaling": None, "window": None, "softcap": None}
    with torch.no_grad():
        found = TreeAttention(packed)(None, query, key, value, dropout=0.0, **options)
        TreeAttention(packed)(None, query, key, value, dropout=0.5, **options)
    assert len(calls) == works
    expected = attend(query, key, value, torch.where(visible(packed), 0.0, float("-inf")), scaling=None)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
