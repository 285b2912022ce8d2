"""What single families of models do unlike all others (`attention/exceptions.py` and `attention/inner.py`).

The zoo's checks run on each of them too; here is what only they have.
"""

import copy
import io

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from hf_prefix import initialize_from_cache
from hf_prefix.errors import PrefixError, UnsupportedCallError, UnsupportedModelError
from upstream import CACHE
from zoo import FIRST_WORD, VOCABULARY, Entry, build
from zoo_checks import PREFIX_LENGTH, attach, hidden_prefix, same

OPENAI_GPT = Entry("openai-gpt", "OpenAIGPTLMHeadModel", is_seq2seq=False)
XLNET = Entry("xlnet", "XLNetLMHeadModel", is_seq2seq=False, variant="causal")
XLM = Entry("xlm", "XLMWithLMHeadModel", is_seq2seq=False)
MPT = Entry("mpt", "MptForCausalLM", is_seq2seq=False)
CPM_ANT = Entry("cpmant", "CpmAntForCausalLM", is_seq2seq=False)
PROPHETNET = Entry("prophetnet", "ProphetNetForCausalLM", is_seq2seq=False, variant="one-head")
DEEPSEEK_V4 = Entry("deepseek_v4", "DeepseekV4ForCausalLM", is_seq2seq=False)
REFORMER = Entry("reformer", "ReformerModelWithLMHead", is_seq2seq=False)
INNER = pytest.mark.parametrize("entry", [OPENAI_GPT, XLNET], ids=lambda entry: entry.name)

PROMPT = [7, 23, 41, 66, 12]


def words(rows: int, length: int) -> Tensor:
    """Return words [rows, length] of any length; they repeat."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_WORD, VOCABULARY, (rows, length), generator=generator)


TOKENS = words(2, 9)


def prompted(entry: Entry) -> PeftModel:
    """Return a tiny model with a prefix that is a prompt."""
    return attach(build(entry), prefix_init="token_ids", prefix_init_token_ids=PROMPT)


def behind_prompt(tokens: Tensor) -> Tensor:
    return torch.cat([torch.tensor(PROMPT).expand(len(tokens), -1), tokens], dim=1)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "_attn") or hasattr(type(module), "rel_attn_core")
    ]


@INNER
@torch.no_grad()
def test_attention_without_a_cache_is_given_back_by_unload(entry: Entry) -> None:
    base = build(entry)(TOKENS).logits
    model = attach(build(entry), prefix_init="random")
    modules = attention_modules(model)
    assert modules
    assert all({"_attn", "rel_attn_core"} & module.__dict__.keys() for module in modules)
    unloaded = model.base_model.unload()
    assert not any({"_attn", "rel_attn_core"} & module.__dict__.keys() for module in modules)
    assert torch.equal(unloaded(TOKENS).logits, base)


@INNER
@torch.no_grad()
def test_a_copy_attends_with_its_own_prefix(entry: Entry) -> None:
    model = attach(build(entry), prefix_init="random")
    before = model(TOKENS).logits
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        if "hf_prefix" in name:
            parameter.zero_()
    assert torch.equal(model(TOKENS).logits, before)
    assert not same(copied(TOKENS).logits, before)


@INNER
@torch.no_grad()
def test_a_whole_model_survives_torch_save(entry: Entry) -> None:
    model = attach(build(entry), prefix_init="random")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@INNER
@torch.no_grad()
def test_several_adapters_switch_and_join(entry: Entry) -> None:
    model = attach(build(entry), prefix_init="random")
    first = model(TOKENS).logits
    config = copy.deepcopy(model.peft_config["default"])
    config.initialized, config.prefix_init_seed = False, 5
    model.add_adapter("other", config)
    model.eval()
    assert torch.equal(model(TOKENS).logits, first)
    model.set_adapter("other")
    other = model(TOKENS).logits
    model.base_model.set_adapter(["default", "other"])
    both = model(TOKENS).logits
    assert not same(other, first)
    assert not same(both, first)
    assert not same(both, other)


@INNER
@torch.no_grad()
def test_attention_weights_are_of_real_queries_and_all_keys(entry: Entry) -> None:
    weights = attach(build(entry), prefix_init="random")(TOKENS, output_attentions=True).attentions
    length = TOKENS.shape[1]
    assert all(of_layer.shape[-2:] == (length, PREFIX_LENGTH + length) for of_layer in weights)
    assert all(torch.allclose(of_layer.sum(-1), torch.ones(())) for of_layer in weights)


@torch.no_grad()
def test_openai_gpt_refuses_more_keys_than_its_causal_table_has() -> None:
    limit = int(build(OPENAI_GPT).config.n_positions)
    model = attach(build(OPENAI_GPT), prefix_init="random", offset_positions=False)
    assert model(words(1, limit - PREFIX_LENGTH)).logits.isfinite().all()
    with pytest.raises(UnsupportedCallError, match=f"attends to {limit} keys at most, which are {limit - 5} tokens"):
        model(words(1, limit - PREFIX_LENGTH + 1))


def two_streams(length: int, total: int) -> dict[str, Tensor]:
    """Return arguments that predict the last `length` of `total` tokens, each from those before it."""
    # One row: with several, transformers 5.23 cannot add this mask to that of a causal model.
    targets = torch.zeros(1, length, total)
    targets[:, torch.arange(length), torch.arange(total - length, total)] = 1
    hidden = torch.ones(total, total).triu()
    return {"perm_mask": hidden[None], "target_mapping": targets}


@torch.no_grad()
@pytest.mark.parametrize("segments", [False, True], ids=["text", "segments"])
def test_both_streams_of_xlnet_see_the_prefix(segments: bool) -> None:
    tokens = TOKENS[:1]
    length, total = tokens.shape[1], tokens.shape[1] + PREFIX_LENGTH
    base, model = build(XLNET), prompted(XLNET)
    wanted_inputs, found_inputs = two_streams(length, total), two_streams(length, length)
    if segments:
        # The prompt is in the segment of the text, as the prefix is in that of every query.
        wanted_inputs["token_type_ids"] = torch.ones(1, total, dtype=torch.long)
        found_inputs["token_type_ids"] = torch.ones(1, length, dtype=torch.long)
    wanted = base(behind_prompt(tokens), **wanted_inputs).logits
    found = model(tokens, **found_inputs).logits
    assert same(found, wanted)
    assert not same(found, base(tokens, **found_inputs).logits)


@torch.no_grad()
def test_memories_of_xlnet_stand_between_prefix_and_text() -> None:
    model = prompted(XLNET)
    whole = model(TOKENS).logits
    first = model(TOKENS[:, :5], use_mems=True)
    second = model(TOKENS[:, 5:], mems=first.mems, use_mems=True)
    assert same(torch.cat([first.logits, second.logits], dim=1), whole)


@torch.no_grad()
def test_the_prefix_of_mpt_fits_in_front_of_the_longest_input() -> None:
    longest = int(build(MPT).config.max_seq_len)
    tokens = words(2, longest - PREFIX_LENGTH)
    wanted = build(MPT)(behind_prompt(tokens)).logits[:, PREFIX_LENGTH:]
    assert same(prompted(MPT)(tokens).logits, wanted)
    assert prompted(MPT)(words(1, longest)).logits.isfinite().all()


@torch.no_grad()
def test_xlm_decodes_with_a_cache_that_it_is_given() -> None:
    model = prompted(XLM)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    parts = [model(TOKENS[:, :end], cache=cache).logits for end in (6, 7, 8, 9)]
    assert same(torch.cat(parts, dim=1), model(TOKENS).logits)
    assert cache.get_seq_length() == TOKENS.shape[1]


@torch.no_grad()
def test_cpm_ant_starts_from_tokens_behind_its_own() -> None:
    base = build(CPM_ANT)
    start = attach(build(CPM_ANT), prefix_init="token_ids", prefix_init_token_ids=PROMPT)
    cache = DynamicCache()
    base(torch.tensor([PROMPT]), **{CACHE: cache}, use_cache=True)
    own = int(base.config.prompt_length)
    site = start.base_model.model.cpmant.encoder.layers[1].self_att.self_attention
    assert torch.equal(site.hf_prefix.prefix_like(torch.zeros(())).key, cache.layers[1].keys[0, :, own:])


@torch.no_grad()
def test_a_cache_fills_the_prefix_of_xlm() -> None:
    model, cache = attach(build(XLM), prefix_init="zero"), EncoderDecoderCache(DynamicCache(), DynamicCache())
    build(XLM)(torch.tensor([PROMPT]), cache=cache)
    initialize_from_cache(model, cache)
    assert torch.equal(model(TOKENS).logits, prompted(XLM)(TOKENS).logits)


@torch.no_grad()
def test_a_cache_fills_the_prefix_of_cpm_ant() -> None:
    model, cache = attach(build(CPM_ANT), prefix_init="zero"), DynamicCache()
    build(CPM_ANT)(torch.tensor([PROMPT]), **{CACHE: cache}, use_cache=True)
    initialize_from_cache(model, cache)
    assert torch.equal(model(TOKENS).logits, prompted(CPM_ANT)(TOKENS).logits)


@INNER
def test_attention_without_a_cache_has_none_to_start_from(entry: Entry) -> None:
    with pytest.raises(PrefixError, match="keeps no keys in a cache"):
        initialize_from_cache(attach(build(entry), prefix_init="zero"), DynamicCache())


@torch.no_grad()
def test_prophetnet_refuses_more_tokens_than_it_has_positions() -> None:
    model = attach(build(PROPHETNET), prefix_init="random")
    limit = int(model.config.max_position_embeddings)
    # One position is for padding, and predictions stand one ahead of the last token.
    longest = limit - PREFIX_LENGTH - 2
    assert model(words(1, longest)).logits.isfinite().all()
    with pytest.raises(UnsupportedCallError, match=f"has learned {limit}"):
        model(words(1, longest + 1))


def test_reformer_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'reformer'.* tokens attend within chunks.* gets a gradient"):
        attach(build(REFORMER))


def test_a_parameter_in_a_frozen_reformer_gets_no_gradient() -> None:
    """Half of the reason for refusing it; where this fails, the refusal may be out of date."""
    model = build(REFORMER).requires_grad_(False).train()
    model.reformer.encoder.layers[0].attention.output.dense.weight.requires_grad_(True)
    assert not model(words(1, 16)).logits.requires_grad


@torch.no_grad()
def test_a_reformer_token_sees_few_chunks() -> None:
    """The other half: what is first in a row reaches no token of a distant chunk in a layer of local attention."""
    layer = next(module for module in build(REFORMER).modules() if type(module).__name__ == "LocalSelfAttention")
    states = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    other = states.clone()
    other[:, 0] = 1.0
    found = [layer(hidden).hidden_states for hidden in (states, other)]
    chunk = int(layer.chunk_length)
    assert not torch.equal(found[0][:, :chunk], found[1][:, :chunk])
    assert torch.equal(found[0][:, 2 * chunk :], found[1][:, 2 * chunk :])


@pytest.mark.parametrize("layers", [None, [0]])
@torch.no_grad()
def test_compressed_windows_move_with_their_tokens(layers: list[int] | None) -> None:
    tokens = words(2, 24)
    model = attach(build(DEEPSEEK_V4), prefix_init="random", layers_to_transform=layers)
    with hidden_prefix():
        moved = model(input_ids=tokens, use_cache=False).logits
        cached = model(input_ids=tokens, use_cache=True).logits
    wanted = build(DEEPSEEK_V4)(input_ids=tokens, use_cache=False).logits
    assert same(moved, wanted)
    assert same(cached, wanted)


def test_keys_of_the_last_run_alone_are_refused() -> None:
    # The setting of Dory, which transformers has from 5.24 on.
    model = build(XLM)
    model.config.recurrent_kv_cache_mode = "last_loop"
    with pytest.raises(UnsupportedModelError, match=r"the last run only.*recurrent_kv_cache_mode='per_loop'"):
        attach(model)
