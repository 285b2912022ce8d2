"""Every attention backend gives the same answer, for single and for packed rows, or says why it cannot."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from transformers import DataCollatorWithFlattening
from transformers.models.bart.modeling_bart import BartDecoderLayer
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from families import CAUSAL, FAMILIES, Family, build, tokens
from hf_prefix import UnsupportedCallError
from hf_prefix.attention import masks
from hf_prefix.attention.block_masks import last_query, prepend_visible_blocks, scroll_out_blocks
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.attention.masks import Extent, check_backend, check_source_mask, mask_behind_prefix
from hf_prefix.attention.packing import check_packing_of_flash
from matrix import (
    BY_NAME,
    PREFIX_LENGTH,
    Batch,
    assert_same,
    attach,
    decoder_words,
    forward_arguments,
    greedy_logits,
    new_cache,
    only_words,
    pad,
    rows_of_words,
    stepwise_logits,
    trainable,
)
from upstream import CACHE, FLEX_WARNINGS, skip_before

pytestmark = FLEX_WARNINGS

FLEX = [family for family in FAMILIES if family.name != "gpt2"]
"""Families that FlexAttention can be chosen for."""
PACKABLE = [family for family in CAUSAL if family.name != "opt"]
"""Families whose base model keeps the sequences of a packed row apart."""
WINDOWED = ["gemma3", "mistral"]
BLOCK = 16
WITHOUT_CUDA = "needs a CUDA GPU, and torch sees none here"


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Run what transformers compiles for FlexAttention as it is: compiling for the CPU takes a minute per family."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=FLEX, ids=lambda family: family.name)
def flex_family(request: pytest.FixtureRequest) -> Family:
    """Every family that FlexAttention can be chosen for."""
    if request.param.name == "t5":
        skip_before("5.18", "has no FlexAttention for T5")
    return request.param


@pytest.fixture(params=PACKABLE, ids=lambda family: family.name)
def packable(request: pytest.FixtureRequest) -> Family:
    """Every family whose base model keeps packed sequences apart."""
    return request.param


def sites(model: PeftModel) -> list[nn.Module]:
    """Return the modules that carry a prefix."""
    return [module for module in model.modules() if isinstance(getattr(module, "hf_prefix", None), PrefixLayer)]


def switch(model: PeftModel, backend: str) -> None:
    """Choose another attention implementation for a model that has its prefix already."""
    model.get_base_model().set_attn_implementation(backend)
    assert {module.config._attn_implementation for module in sites(model)} == {backend}


def padded(family: Family) -> Batch:
    """Return rows beyond the sliding windows, one with padding."""
    batch = pad(rows_of_words([30, 21]), "right" if family.is_encoder_decoder else "left")
    if family.name != "t5":
        return batch
    # T5 of transformers 5.23 indexes its position bias by row, but the bias has only one: FlexAttention takes one.
    return Batch(batch.words[1:], batch.mask[1:])


def logits_of_words(model: PeftModel, family: Family, batch: Batch) -> Tensor:
    """Return the logits of all that is no padding."""
    logits = model(**forward_arguments(family, batch)).logits
    return logits if family.is_encoder_decoder else logits[batch.real]


def packed(lengths: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return sequences [1, length], and the arguments of the row that packs them."""
    sequences = [tokens(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return sequences, {"input_ids": torch.cat(sequences, dim=1), "position_ids": positions[None]}


def boundaries(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return what FlashAttention is told of a packed row."""
    ends = torch.tensor([0, *lengths]).cumsum(dim=0).int()
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@torch.no_grad()
def test_every_backend_gives_the_same_logits(flex_family: Family, projection: bool, uncompiled: None) -> None:
    model = attach(flex_family, prefix_projection=projection)
    batch = padded(flex_family)
    wanted = logits_of_words(model, flex_family, batch)
    for backend in ("sdpa", "flex_attention", "eager"):
        switch(model, backend)
        assert_same(logits_of_words(model, flex_family, batch), wanted)


@torch.no_grad()
def test_every_backend_generates_the_same(flex_family: Family, uncompiled: None) -> None:
    model = attach(flex_family)
    batch = padded(flex_family)
    wanted = greedy_logits(model, batch)
    for backend in ("sdpa", "flex_attention"):
        switch(model, backend)
        assert_same(greedy_logits(model, batch), wanted)


@torch.no_grad()
def test_flex_takes_chunks_on_top_of_a_cache(flex_family: Family, uncompiled: None) -> None:
    model = attach(flex_family)
    rows = 1 if flex_family.name == "t5" else 2
    batch = only_words(rows, 30)
    words = decoder_words(rows, 30) if flex_family.is_encoder_decoder else batch.words
    wanted = model(**forward_arguments(flex_family, batch, words)).logits
    switch(model, "flex_attention")
    cache = new_cache("dynamic", model, flex_family, capacity=40, source=30)
    assert_same(stepwise_logits(model, flex_family, batch, words, cache, [14, 1, 15]), wanted)


@torch.no_grad()
def test_flex_takes_a_static_cache_of_a_window(uncompiled: None) -> None:
    family = BY_NAME["mistral"]
    model = attach(family)
    batch = only_words(2, 30)
    wanted = model(batch.words).logits
    switch(model, "flex_attention")
    cache = new_cache("static", model, family, capacity=40, source=0)
    assert_same(stepwise_logits(model, family, batch, batch.words, cache, [14, 1, 15]), wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bart", "t5"])
def test_flex_refuses_to_go_on_with_a_static_cache(name: str, uncompiled: None) -> None:
    if name == "t5":
        skip_before("5.18", "has no FlexAttention for T5")
    family = BY_NAME[name]
    model = attach(family)
    batch = only_words(1, 30)
    words = decoder_words(1, 30) if family.is_encoder_decoder else batch.words
    with model.disable_adapter():
        wanted = model(**forward_arguments(family, batch, words)).logits
    switch(model, "flex_attention")
    with pytest.raises(UnsupportedCallError, match=r"shows empty slots of a static cache.*use a dynamic cache"):
        stepwise_logits(model, family, batch, words, new_cache("static", model, family, 40, 30), [14, 1, 15])
    # When this fails, transformers has mended it, and the refusal can go.
    with model.disable_adapter():
        cache = new_cache("static", model, family, 40, 30)
        got = stepwise_logits(model, family, batch, words, cache, [14, 1, 15])
    assert (got - wanted).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOWED)
def test_every_backend_lets_the_prefix_scroll_out(name: str, uncompiled: None) -> None:
    family = BY_NAME[name]
    model, pinned = attach(family, sliding_window="scroll"), attach(family)
    batch = padded(family)
    wanted, generated = logits_of_words(model, family, batch), greedy_logits(model, batch)
    assert (logits_of_words(pinned, family, batch) - wanted).abs().max() > 0.1
    for backend in ("sdpa", "flex_attention"):
        switch(model, backend)
        assert_same(logits_of_words(model, family, batch), wanted)
        assert_same(greedy_logits(model, batch), generated)


@torch.no_grad()
def test_flex_without_the_prefix_is_the_base_model(flex_family: Family, uncompiled: None) -> None:
    batch = padded(flex_family)
    wanted = build(flex_family, "flex_attention")(**forward_arguments(flex_family, batch)).logits
    model = attach(flex_family, "flex_attention")
    assert not torch.equal(model(**forward_arguments(flex_family, batch)).logits, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**forward_arguments(flex_family, batch)).logits, wanted)


@torch.no_grad()
def test_flex_takes_a_mask_of_scores_and_a_block_mask_of_the_user(uncompiled: None) -> None:
    model = attach(BY_NAME["llama"])
    words = tokens(2, 12)
    seen = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    seen = seen.tril() | torch.eye(12, dtype=torch.bool)
    scores = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    wanted = model(input_ids=words, attention_mask=scores).logits
    switch(model, "flex_attention")
    assert_same(model(input_ids=words, attention_mask=scores).logits, wanted)

    table = seen[:, 0]

    def look_up(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[batch, query, key]

    blocks = create_block_mask(look_up, 2, None, 12, 12, device="cpu")
    assert_same(model(input_ids=words, attention_mask=blocks).logits, wanted)


def test_a_block_mask_without_a_function_is_refused() -> None:
    mask = BlockMask.from_kv_blocks(torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    with pytest.raises(UnsupportedCallError, match="BlockMask without a mask_mod"):
        prepend_visible_blocks(mask, PREFIX_LENGTH)


def causal_function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Queries stand behind three keys of a cache."""
    return key <= query + 3


def window_function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A causal window of 20."""
    return (key <= query) & (query - key < 20)


def padding_function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Causal, with padding on the left of the second row."""
    return (key <= query) & (key >= batch * 17)


def block_tables(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Return which blocks are visible at all, and which are listed as full."""
    full = torch.zeros_like(mask.full_kv_indices).bool()
    for place in product(*(range(size) for size in full.shape[:-1])):
        full[place][mask.full_kv_indices[place][: mask.full_kv_num_blocks[place]]] = True
    return mask.to_dense().bool(), full


@pytest.mark.parametrize("function", [causal_function, window_function, padding_function])
@pytest.mark.parametrize("prefix", [1, 5, BLOCK, BLOCK + 5, 2 * BLOCK])
@pytest.mark.parametrize(("queries", "keys"), [(1, 33), (16, 16), (33, 64), (64, 65)])
@pytest.mark.parametrize("scrolls", [False, True], ids=["pin", "scroll"])
def test_blocks_move_with_their_function(function: Any, prefix: int, queries: int, keys: int, scrolls: bool) -> None:
    seen = create_mask(function, 2, 1, queries, keys, device="cpu")
    wanted = torch.cat([torch.ones(2, 1, queries, prefix, dtype=torch.bool), seen], dim=-1)
    old = create_block_mask(function, 2, None, queries, keys, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(last_query(old), seen[:, 0, -1])
    mask = prepend_visible_blocks(old, prefix)
    if scrolls:
        positions = torch.arange(queries) + prefix
        mask = scroll_out_blocks(mask, positions[None], prefix, window=7)
        wanted[..., :prefix] &= positions[:, None] - torch.arange(prefix) < 7
    assert torch.equal(create_mask(mask.mask_mod, 2, 1, queries, prefix + keys, device="cpu"), wanted)
    # Blocks may be listed as partly visible for nothing, but a visible one must be listed, and a full one be full.
    exact = create_block_mask(mask.mask_mod, 2, None, queries, prefix + keys, device="cpu", BLOCK_SIZE=BLOCK)
    assert mask.shape == exact.shape
    (visible, full), (exact_visible, exact_full) = block_tables(mask), block_tables(exact)
    assert not (exact_visible & ~visible).any()
    assert not (full & ~exact_full).any()
    assert (visible != exact_visible).float().mean() < 0.5


def test_full_blocks_stay_full() -> None:
    old = create_block_mask(causal_function, 1, None, 64, 64, device="cpu", BLOCK_SIZE=BLOCK)
    _, full = block_tables(prepend_visible_blocks(old, BLOCK))
    assert full[0, 0].tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
    ]


def test_layers_share_one_block_mask() -> None:
    old = create_block_mask(causal_function, 1, None, 20, 20, device="cpu")
    first = prepend_visible_blocks(old, PREFIX_LENGTH)
    assert prepend_visible_blocks(old, PREFIX_LENGTH) is first
    longer = prepend_visible_blocks(old, PREFIX_LENGTH + 1)
    assert longer.seq_lengths == (20, 20 + PREFIX_LENGTH + 1)
    assert prepend_visible_blocks(old, PREFIX_LENGTH).seq_lengths == (20, 20 + PREFIX_LENGTH)


@torch.no_grad()
def test_the_compiled_kernel_follows_the_moved_blocks() -> None:
    prefix, length = 21, 60
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, length, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, prefix + length, 16, generator=generator)
    old = create_block_mask(padding_function, 2, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    mask = prepend_visible_blocks(old, prefix)
    got = torch.compile(flex_attention)(query, key, value, block_mask=mask)
    dense = create_mask(mask.mask_mod, 2, 1, length, prefix + length, device="cpu")
    wanted = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    assert_same(got, wanted)


def test_flex_cannot_train_on_a_cpu(uncompiled: None) -> None:
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip("torch 2.8 has a backward pass there, torch 2.13 says itself that it has none")
    model = attach(BY_NAME["llama"], "flex_attention")
    with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
        model(input_ids=tokens(1, 5))


def test_flex_is_not_there_for_every_family() -> None:
    for family in FAMILIES:
        if family not in FLEX:
            with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex"):
                build(family, "flex_attention")


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("window", ["pin", "scroll"])
def test_a_packed_row_is_its_sequences_alone(packable: Family, backend: str, window: str, uncompiled: None) -> None:
    if backend == "flex_attention" and packable not in FLEX:
        pytest.skip(f"transformers has no FlexAttention for {packable.name}")
    sequences, row = packed((7, 1, 40))
    base = build(packable, backend)
    assert_same(base(**row, use_cache=False).logits, torch.cat([base(words).logits for words in sequences], dim=1))
    model = attach(packable, backend, sliding_window=window)
    wanted = torch.cat([model(words).logits for words in sequences], dim=1)
    assert_same(model(**row, use_cache=False).logits, wanted)


def test_a_packed_row_trains_as_its_sequences_alone(packable: Family, backend: str) -> None:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    sequences, _ = packed((7, 12, 9))
    batch = collate([{"input_ids": words[0].tolist()} for words in sequences])
    model = attach(packable, backend)
    model(**batch, use_cache=False).loss.backward()
    got = {name: parameter.grad for name, parameter in trainable(model).items()}
    model.zero_grad()
    targets = sum(words.shape[1] - 1 for words in sequences)
    for words in sequences:
        (model(words, labels=words).loss * (words.shape[1] - 1) / targets).backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_sequences_may_together_exceed_the_learned_positions(backend: str) -> None:
    model = attach(BY_NAME["gpt2"], backend)
    sequences, row = packed((70, 90))
    wanted = torch.cat([model(words).logits for words in sequences], dim=1)
    assert_same(model(**row, use_cache=False).logits, wanted)
    _, row = packed((5, 124))
    with pytest.raises(
        UnsupportedCallError, match=rf"124 tokens behind a prefix of {PREFIX_LENGTH} need 129 positions"
    ):
        model(**row, use_cache=False)


@torch.no_grad()
def test_packed_rows_are_refused_where_they_are_not_kept_apart(packable: Family, backend: str) -> None:
    model = attach(packable, backend)
    _, row = packed((7, 5))
    with pytest.raises(UnsupportedCallError, match=r"start again within a row.*pass use_cache=False"):
        model(**row)
    cache = new_cache("dynamic", model, packable, capacity=20, source=0)
    with pytest.raises(UnsupportedCallError, match=r"start again within a row.*pass use_cache=False"):
        model(**row, **{CACHE: cache})
    with pytest.raises(UnsupportedCallError, match="boundaries of packed sequences came without position_ids"):
        model(input_ids=row["input_ids"], **boundaries((7, 5)))
    # Positions of one sequence are fine, wherever they start.
    assert model(input_ids=row["input_ids"], position_ids=torch.arange(3, 15)[None]).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_a_packed_row_is_refused_where_the_base_model_mixes_it(backend: str, uncompiled: None) -> None:
    family = BY_NAME["opt"]
    sequences, row = packed((7, 5))
    model = attach(family, backend)
    with model.disable_adapter():
        alone = torch.cat([model(words).logits for words in sequences], dim=1)
        assert (model(**row, use_cache=False).logits - alone).abs().max() > 0.1
    with pytest.raises(UnsupportedCallError, match="but OPTDecoder does not keep its sequences apart; pad them"):
        model(**row, use_cache=False)
    # What was found out about one row says nothing of the next.
    assert model(row["input_ids"], use_cache=False).logits.isfinite().all()


@torch.no_grad()
def test_a_packed_row_may_be_any_row_of_a_batch(backend: str) -> None:
    model = attach(BY_NAME["llama"], backend)
    _, row = packed((7, 5))
    plain = {"input_ids": tokens(1, 12), "position_ids": torch.arange(12)[None]}
    both = {name: torch.cat([plain[name], row[name]]) for name in row}
    got = model(**both, use_cache=False).logits
    assert_same(got[:1], model(plain["input_ids"]).logits)
    assert_same(got[1:], model(**row, use_cache=False).logits)


def new_tokens(count: int) -> Extent:
    """Return the extent of a call with new tokens and no cache."""
    return Extent.of(torch.zeros(1, count, 32), None, None)


def flash_site(model: PeftModel) -> nn.Module:
    """Return an attention module that believes to run FlashAttention, which no CPU has."""
    module = sites(model)[0]
    module.config._attn_implementation = "flash_attention_2"
    return module


def test_flash_refuses_packed_rows() -> None:
    module = flash_site(attach(BY_NAME["llama"]))
    hidden, match = torch.zeros(1, 5, 32), r"packs several sequences in a row by their lengths.*use 'sdpa'"
    for arguments in ({"position_ids": torch.tensor([[5, 6, 7, 5, 6]])}, boundaries((3, 2))):
        with pytest.raises(UnsupportedCallError, match=match):
            module(hidden, **arguments)
    # What transformers does not take for a packed row: one sequence, two rows, padding, one token.
    check_packing_of_flash(module, {"position_ids": torch.arange(5)[None] + PREFIX_LENGTH}, None)
    check_packing_of_flash(module, {"position_ids": torch.tensor([[5, 6, 5], [5, 6, 5]])}, None)
    check_packing_of_flash(module, {"position_ids": torch.tensor([[5, 5, 6]])}, torch.tensor([[False, True, True]]))
    check_packing_of_flash(module, {"position_ids": torch.tensor([[9]])}, None)


@pytest.mark.parametrize("name", WINDOWED)
def test_flash_refuses_to_pin_a_prefix_to_its_window(name: str) -> None:
    module = flash_site(attach(BY_NAME[name]))
    with pytest.raises(UnsupportedCallError, match=r"cuts the sliding window itself.*sliding_window='scroll'"):
        module(torch.zeros(1, 5, 32))
    check_backend(module, scrolls=True)


def test_flash_refuses_a_padded_source() -> None:
    model = attach(BY_NAME["bart"])
    flash_site(model)
    module = next(module for module in model.modules() if isinstance(module, BartDecoderLayer)).encoder_attn
    mask = torch.tensor([[True, True, False]])
    states = {"key_value_states": torch.zeros(1, 3, 32), "attention_mask": mask}
    with pytest.raises(UnsupportedCallError, match="cannot attend to a padded source with several tokens at once"):
        module(torch.zeros(1, 5, 32), **states)
    check_source_mask(module, mask, new_tokens(1))
    check_source_mask(module, None, new_tokens(5))


def test_flash_that_aligns_at_the_top_left_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = flash_site(attach(BY_NAME["llama"]))
    check_backend(module, scrolls=False)
    monkeypatch.setattr(masks, "flash_attn_supports_top_left_mask", lambda: True)
    with pytest.raises(UnsupportedCallError, match="aligns its causal mask at the top left"):
        check_backend(module, scrolls=False)


def test_flash_keeps_its_kinds_of_masks() -> None:
    module = flash_site(attach(BY_NAME["llama"]))
    extent = new_tokens(3)
    assert mask_behind_prefix(None, module, 2, extent) is None
    padding = torch.tensor([[False, True, True]])
    assert mask_behind_prefix(padding, module, 2, extent).tolist() == [[True, True, False, True, True]]


def test_an_unknown_backend_without_a_mask_is_refused() -> None:
    module = sites(attach(BY_NAME["llama"]))[0]
    module.config._attn_implementation = "mine"
    with pytest.raises(UnsupportedCallError, match=r"'mine' is given no mask.*AttentionMaskInterface"):
        module(torch.zeros(1, 5, 32))
    # One query sees every key, and a mask says what it means.
    assert mask_behind_prefix(None, module, 2, new_tokens(1)) is None
    assert mask_behind_prefix(torch.ones(1, 1, 1, 1).bool(), module, 2, new_tokens(1)).shape[-1] == 3


def largest_difference(got: Tensor, wanted: Tensor) -> float:
    """Return how far logits in half precision are from those in float32."""
    return (got.float() - wanted).abs().max().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT_CUDA)
@pytest.mark.parametrize(
    ("version", "available"),
    [("flash_attention_2", is_flash_attn_2_available()), ("flash_attention_3", is_flash_attn_3_available())],
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "opt"])
@torch.no_grad()
def test_flash_is_as_exact_as_sdpa(name: str, version: str, available: bool) -> None:
    if not available:
        pytest.skip(f"the package of {version} is not installed")
    family = BY_NAME[name]
    exact = attach(family, "sdpa", sliding_window="scroll").cuda()
    half = attach(family, "sdpa", sliding_window="scroll", dtype=torch.bfloat16).cuda()
    batch = padded(family)
    batch = Batch(batch.words.cuda(), batch.mask.cuda())
    wanted, generated = logits_of_words(exact, family, batch), greedy_logits(exact, batch, new_tokens=1)
    allowed = 2 * largest_difference(logits_of_words(half, family, batch), wanted)
    switch(half, version)
    assert largest_difference(logits_of_words(half, family, batch), wanted) <= allowed
    assert largest_difference(greedy_logits(half, batch, new_tokens=1), generated) <= allowed


@pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT_CUDA)
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bart"])
def test_flex_trains_on_a_gpu(name: str) -> None:
    family = BY_NAME[name]
    model = attach(family, "sdpa").cuda()
    batch = padded(family)
    arguments = {key: value.cuda() for key, value in forward_arguments(family, batch).items()}
    gradients = []
    for backend in ("sdpa", "flex_attention"):
        switch(model, backend)
        model.zero_grad()
        model(**arguments, use_cache=False).logits.square().mean().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in trainable(model).items()})
    for key, wanted in gradients[0].items():
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradients[1][key], wanted, atol=1e-4, rtol=1e-3)
