"""Where a prefix starts: each source gives the keys and values that it says, and refuses what it cannot give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerFast, StaticCache

import zoo
import zoo_checks
from adapters import BART, BY_NAME, GPT2, LLAMA, T5, attach, deeper_llama, edited_weights, logits, prefix_config
from families import VOCABULARY, Family, build, tokens
from hf_prefix import PrefixConfig, PrefixError, PrefixMismatchError, initialize_from_cache
from hf_prefix.attention.layer import PrefixLayer
from upstream import CACHE, cache_of

TEXT = "alpha beta gamma"
TEXT_IDS = [10, 11, 12]


def key_values(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what attention gets from the prefix, by attention module."""
    with torch.no_grad():
        return {
            name.removesuffix(".hf_prefix"): layer.hf_prefix_encoder["default"]()
            for name, layer in model.get_base_model().named_modules()
            if isinstance(layer, PrefixLayer)
        }


def same(first: PeftModel, second: PeftModel, tolerance: float = 0.0) -> bool:
    """Whether two models have the same keys and values everywhere."""
    one, other = key_values(first), key_values(second)
    return one.keys() == other.keys() and all(
        torch.allclose(tensor, one_tensor, rtol=0.0, atol=tolerance)
        for name in one
        for tensor, one_tensor in zip(one[name], other[name], strict=True)
    )


def from_tokens(family: Family, token_ids: list[int], **options: Any) -> PeftModel:
    """Return a model whose prefix starts from tokens."""
    return attach(
        family,
        prefix_init="token_ids",
        prefix_init_token_ids=token_ids,
        **({"num_virtual_tokens": None} | options),
    )


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tokenizer that knows three words and puts a start token in front of a text."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "alpha": 10, "beta": 11, "gamma": 12}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def test_token_ids_give_their_activations(causal_family: Family) -> None:
    base = build(causal_family)
    with torch.no_grad():
        cache = cache_of(base(torch.tensor([TEXT_IDS]), **{CACHE: DynamicCache()}))
    for layer, (key, value) in zip(
        cache.layers, key_values(from_tokens(causal_family, TEXT_IDS)).values(), strict=True
    ):
        assert torch.allclose(key, layer.keys[0], atol=1e-6)
        assert torch.allclose(value, layer.values[0], atol=1e-6)


def test_token_ids_give_the_activations_of_encoder_and_decoder(seq2seq_family: Family) -> None:
    token_ids = torch.tensor([TEXT_IDS])
    with torch.no_grad():
        cache = cache_of(build(seq2seq_family)(input_ids=token_ids, decoder_input_ids=token_ids))
    prefix = key_values(from_tokens(seq2seq_family, TEXT_IDS))
    decoder = [states for name, states in prefix.items() if "decoder" in name]
    expected = [
        layer
        for pair in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        for layer in pair
        if layer.keys is not None
    ]
    assert len(decoder) == len(expected)
    for (key, value), layer in zip(decoder, expected, strict=True):
        assert torch.allclose(key, layer.keys[0], atol=1e-6)
        assert torch.allclose(value, layer.values[0], atol=1e-6)
    assert sum("encoder." in name for name in prefix) == seq2seq_family.shape["encoder"][0]


def test_real_tokens_are_activations_of_tokens_drawn_with_the_seed(family: Family) -> None:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(VOCABULARY, (5,), generator=generator).tolist()
    options = {"num_virtual_tokens": 5, "prefix_init": "real_tokens"}
    first = attach(family, prefix_init_seed=4, **options)
    assert same(first, from_tokens(family, drawn))
    torch.manual_seed(99)
    assert same(first, attach(family, prefix_init_seed=4, **options))
    assert not same(first, attach(family, prefix_init_seed=5, **options))


def test_real_tokens_are_the_default() -> None:
    assert PrefixConfig(num_virtual_tokens=1).prefix_init == "real_tokens"


def test_random_is_drawn_with_the_seed_alone(family: Family, projection: bool) -> None:
    first = attach(family, projection)
    torch.manual_seed(99)
    assert same(first, attach(family, projection))
    assert not same(first, attach(family, projection, prefix_init_seed=1))


def test_random_is_standard_normal() -> None:
    numbers = torch.cat(
        [tensor.flatten() for states in key_values(attach(T5, num_virtual_tokens=64)).values() for tensor in states]
    )
    assert abs(numbers.mean().item()) < 0.02
    assert abs(numbers.std().item() - 1) < 0.02


def test_zero_is_zeros(family: Family, projection: bool) -> None:
    model = attach(family, projection, prefix_init="zero")
    assert all(not tensor.any() for states in key_values(model).values() for tensor in states)
    assert not torch.equal(logits(model), logits(build(family)))


INITIALISATIONS: list[dict[str, Any]] = [
    {"prefix_init": "real_tokens"},
    {"prefix_init": "token_ids", "prefix_init_token_ids": TEXT_IDS},
    {"prefix_init": "zero"},
]


@pytest.mark.parametrize("options", INITIALISATIONS, ids=lambda options: options["prefix_init"])
def test_projection_starts_where_the_direct_prefix_does(family: Family, options: dict[str, Any]) -> None:
    assert same(attach(family, True, **options), attach(family, **options), tolerance=1e-5)


def test_projection_as_wide_as_the_prefix_is_long_is_exact() -> None:
    options = {"num_virtual_tokens": 8, "prefix_init": "real_tokens"}
    assert same(attach(LLAMA, True, **options), attach(LLAMA, **options), tolerance=1e-5)


def test_projection_narrower_than_the_prefix_is_long_warns() -> None:
    with pytest.warns(UserWarning, match=r"9 learned virtual tokens exceed encoder_hidden_size=8.*only near"):
        attach(LLAMA, True, num_virtual_tokens=9, prefix_init="real_tokens")


def text_prefix(folder: str | None, family: Family = LLAMA, **options: Any) -> PeftModel:
    """Return a model whose prefix starts from a text."""
    return attach(
        family,
        prefix_init="text",
        tokenizer_name_or_path=folder,
        **({"num_virtual_tokens": None, "prefix_init_text": TEXT} | options),
    )


@pytest.mark.parametrize("family", [LLAMA, GPT2, BART, T5], ids=lambda family: family.name)
def test_text_decides_the_length(family: Family, tokenizer_folder: str, tmp_path: Path) -> None:
    model = text_prefix(tokenizer_folder, family)
    assert model.peft_config["default"].num_virtual_tokens == 3
    assert same(model, from_tokens(family, TEXT_IDS))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_shorter_text_is_repeated(tokenizer_folder: str) -> None:
    model = text_prefix(tokenizer_folder, num_virtual_tokens=5)
    assert same(model, from_tokens(LLAMA, [10, 11, 12, 10, 11]))


def test_shorter_tokens_are_repeated() -> None:
    assert same(from_tokens(LLAMA, [7], num_virtual_tokens=3), from_tokens(LLAMA, [7, 7, 7]))


def test_longer_text_is_refused(tokenizer_folder: str) -> None:
    with pytest.raises(PrefixError, match=r"start from 3 tokens but has num_virtual_tokens=2.*set it to 3"):
        text_prefix(tokenizer_folder, num_virtual_tokens=2)


def test_text_without_tokens_is_refused(tokenizer_folder: str) -> None:
    with pytest.raises(PrefixError, match="has no tokens"):
        text_prefix(tokenizer_folder, prefix_init_text="   ")


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(PrefixError, match=r"needs a tokenizer.*tokenizer_name_or_path"):
        text_prefix(None)


def test_text_uses_the_tokenizer_of_the_model(tokenizer_folder: str) -> None:
    base = build(LLAMA)
    base.config.name_or_path = tokenizer_folder
    model = get_peft_model(
        base, prefix_config(LLAMA, num_virtual_tokens=None, prefix_init="text", prefix_init_text=TEXT)
    )
    assert same(model, from_tokens(LLAMA, TEXT_IDS))


@pytest.mark.parametrize("token_id", [VOCABULARY, -1])
def test_tokens_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(PrefixError, match=f"{token_id}.*vocabulary.*{VOCABULARY}"):
        from_tokens(LLAMA, [7, token_id])


@pytest.mark.parametrize("family", [LLAMA, BART, T5], ids=lambda family: family.name)
def test_another_prefix_gives_its_keys_and_values(family: Family, projection: bool, tmp_path: Path) -> None:
    source = attach(family, prefix_init_seed=6)
    source.save_pretrained(tmp_path)
    model = attach(family, projection, prefix_init="prefix", prefix_init_path=str(tmp_path))
    assert same(model, source, tolerance=1e-5 if projection else 0.0)


@pytest.mark.parametrize("options", [{"num_virtual_tokens": 4}, {"layers_to_transform": [0, 1]}], ids=str)
def test_another_prefix_of_other_shapes_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    attach(LLAMA, layers_to_transform=[0]).save_pretrained(tmp_path)
    with pytest.raises(PrefixMismatchError, match=r"self_attn needs keys and values of shape"):
        attach(LLAMA, prefix_init="prefix", prefix_init_path=str(tmp_path), **options)


def test_another_prefix_of_another_family_is_refused(tmp_path: Path) -> None:
    attach(GPT2).save_pretrained(tmp_path)
    with pytest.raises(PrefixMismatchError, match="none for it"):
        attach(LLAMA, prefix_init="prefix", prefix_init_path=str(tmp_path))


def test_another_prefix_with_its_projection_is_refused(tmp_path: Path) -> None:
    attach(LLAMA, projection=True, keep_projection=True).save_pretrained(tmp_path)
    with pytest.raises(PrefixError, match=r"holds no keys and values.*fold_prefix"):
        attach(LLAMA, prefix_init="prefix", prefix_init_path=str(tmp_path))


def test_another_prefix_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    attach(LLAMA).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        next(iter(weights.values()))[0, 0, 0] = float("nan")
    with pytest.raises(PrefixMismatchError, match=r"damaged|finite"):
        attach(LLAMA, prefix_init="prefix", prefix_init_path=str(tmp_path))


def test_initialisation_leaves_the_base_models_mode_alone() -> None:
    base = build(LLAMA).train()
    base.model.layers[0].eval()
    modes = [module.training for module in base.modules()]
    get_peft_model(base, prefix_config(LLAMA, prefix_init="real_tokens"))
    found = [module.training for name, module in base.named_modules() if "hf_prefix" not in name]
    assert found == modes


def test_text_start_of_a_bfloat16_model_is_finite_and_float32() -> None:
    model = get_peft_model(build(LLAMA).to(torch.bfloat16), prefix_config(LLAMA, prefix_init="real_tokens"))
    assert all(
        tensor.dtype == torch.float32 and tensor.isfinite().all()
        for states in key_values(model).values()
        for tensor in states
    )


def filled_cache(base: PreTrainedModel, length: int, rows: int = 1) -> DynamicCache | EncoderDecoderCache:
    """Return a cache that the base model filled with the tests' tokens."""
    token_ids = tokens(1, length).repeat(rows, 1)
    inputs = {"input_ids": token_ids}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    else:
        cache = DynamicCache()
    with torch.no_grad():
        return cache_of(base(**inputs, **{CACHE: cache}))


def test_cache_of_tokens_is_what_the_tokens_give(causal_family: Family, projection: bool) -> None:
    cache = filled_cache(build(causal_family), 3)
    model = attach(causal_family, projection, prefix_init="zero")
    initialize_from_cache(model, cache)
    assert same(model, from_tokens(causal_family, tokens(1, 3)[0].tolist()), tolerance=1e-5)


def test_cache_of_an_encoder_decoder_model(seq2seq_family: Family, projection: bool) -> None:
    cache = filled_cache(build(seq2seq_family), 3)
    options = {"roles": ["decoder", "cross"]}
    model = attach(seq2seq_family, projection, prefix_init="zero", **options)
    initialize_from_cache(model, cache)
    expected = from_tokens(seq2seq_family, tokens(1, 3)[0].tolist(), **options)
    assert same(model, expected, tolerance=1e-5)


def test_static_cache_gives_its_filled_part() -> None:
    base = build(LLAMA)
    cache = StaticCache(base.config, max_cache_len=16)
    with torch.no_grad():
        base(tokens(1, 3), **{CACHE: cache})
    model = attach(LLAMA, prefix_init="zero")
    initialize_from_cache(model, cache)
    assert same(model, from_tokens(LLAMA, tokens(1, 3)[0].tolist()), tolerance=1e-5)


def test_cache_reaches_the_prefix_after_a_forward_pass() -> None:
    model = attach(LLAMA, prefix_init="zero")
    before = logits(model)
    initialize_from_cache(model, filled_cache(build(LLAMA), 3))
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), logits(from_tokens(LLAMA, tokens(1, 3)[0].tolist())))


def test_cache_of_the_prefixed_model_itself() -> None:
    model = attach(LLAMA)
    with model.disable_adapter():
        cache = filled_cache(model, 3)
    initialize_from_cache(model, cache)
    assert same(model, from_tokens(LLAMA, tokens(1, 3)[0].tolist()), tolerance=1e-5)


def test_cache_without_peft_model() -> None:
    model = build(LLAMA)
    model.add_adapter(prefix_config(LLAMA, prefix_init="zero"))
    initialize_from_cache(model.eval(), filled_cache(build(LLAMA), 3))
    assert torch.equal(logits(model), logits(from_tokens(LLAMA, tokens(1, 3)[0].tolist())))


def test_cache_of_another_length_is_refused() -> None:
    with pytest.raises(PrefixMismatchError, match=r"\(2, 3, 8\).*has \(\(2, 4, 8\)"):
        initialize_from_cache(attach(LLAMA), filled_cache(build(LLAMA), 4))


def test_cache_of_another_model_is_refused() -> None:
    with pytest.raises(PrefixMismatchError, match=r"\(2, 3, 8\).*has \(\(2, 3, 16\)"):
        initialize_from_cache(attach(LLAMA), filled_cache(build(BY_NAME["qwen3"]), 3))


def test_cache_of_several_rows_is_refused() -> None:
    with pytest.raises(PrefixError, match="cache of one row, got one of 2 rows"):
        initialize_from_cache(attach(LLAMA), filled_cache(build(LLAMA), 3, rows=2))


def test_empty_cache_is_refused() -> None:
    with pytest.raises(PrefixError, match="cache"):
        initialize_from_cache(attach(LLAMA), DynamicCache())


def test_cache_of_a_model_with_fewer_layers_is_refused() -> None:
    model = get_peft_model(deeper_llama(), prefix_config(LLAMA))
    with pytest.raises(PrefixError, match="layer"):
        initialize_from_cache(model, filled_cache(build(LLAMA), 3))


def test_cache_holds_nothing_for_an_encoder(seq2seq_family: Family) -> None:
    with pytest.raises(PrefixError, match=r"is encoder attention, of which .* holds nothing"):
        initialize_from_cache(attach(seq2seq_family), filled_cache(build(seq2seq_family), 3))


def test_decoder_cache_holds_nothing_for_cross_attention(seq2seq_family: Family) -> None:
    cache = filled_cache(build(seq2seq_family), 3).self_attention_cache
    with pytest.raises(PrefixError, match=r"is cross attention, of which a DynamicCache holds nothing"):
        initialize_from_cache(attach(seq2seq_family, roles=["decoder", "cross"]), cache)


def test_refused_cache_leaves_the_prefix_as_it_was() -> None:
    model = attach(LLAMA)
    before = get_peft_model_state_dict(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(PrefixMismatchError, match="has"):
        initialize_from_cache(model, filled_cache(build(LLAMA), 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_peft_model_state_dict(model).items())


def test_cache_for_an_unknown_prefix_is_refused() -> None:
    with pytest.raises(PrefixError, match="no prefix named 'missing'"):
        initialize_from_cache(attach(LLAMA), filled_cache(build(LLAMA), 3), "missing")


@pytest.mark.parametrize("model_type", ["hrm_text", "deepseek_v32", "gemma4_text"])
def test_a_cache_of_several_places_or_latents_is_that_prompt(model_type: str) -> None:
    entry = next(entry for entry in zoo.entries() if entry.model_type == model_type)
    base, prompt, words = zoo.build(entry), zoo.words(1, 5, seed=9), zoo.words(2, 9)
    model = zoo_checks.attach(zoo.build(entry), prefix_init="random")
    with torch.no_grad():
        initialize_from_cache(model, cache_of(base(input_ids=prompt, use_cache=True)))
        wanted = base(input_ids=torch.cat([prompt.expand(2, -1), words], dim=1), use_cache=False).logits[:, 5:]
        found = model(input_ids=words, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
