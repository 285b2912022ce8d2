"""The attention mass on a prefix is its share of the softmax, and what cannot be measured is refused by name."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import zoo
from adapters import BART, GPT2, LLAMA, hook_count
from families import Family, build
from formulas import FORMULAS, WINDOWS, Observer, position_bias
from hf_prefix import PrefixConfig, PrefixError, UnsupportedCallError, UnsupportedModelError, fold_prefix
from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.sites import AttentionSite
from hf_prefix.attention.tuner_layer import prefixes_off
from hf_prefix.errors import DataError
from hf_prefix.inspection.attention_mass import AttentionMass, measure_attention_mass
from hf_prefix.inspection.inputs import encode_text
from hf_prefix.training import PairEncoder
from matrix import PREFIX_LENGTH, attach, decoder_words, pad, rows_of_words
from reference import shares, visibility
from tiny_model import CONTEXT, tiny_bart, tiny_gpt2, tiny_llama, tiny_tokenizer

TOLERANCE = 1e-5
"""Largest difference of shares between two orders of the same float32 sums."""


def texts(family: Family, *lengths: int) -> list[dict[str, Tensor]]:
    """Return an input for each length; the decoder of an encoder-decoder reads seven tokens."""
    decoder = {"decoder_input_ids": decoder_words(1)} if family.is_encoder_decoder else {}
    return [{"input_ids": row[None]} | decoder for row in rows_of_words(list(lengths))]


def sites_of(model: PeftModel) -> list[AttentionSite]:
    """Return the attention modules of a model with a prefix."""
    with prefixes_off(model.get_base_model()):
        return find_sites(model.get_base_model())


def by_the_reference(model: PeftModel, family: Family, text: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the shares of the prefix and of the tokens in each attention module [heads, query], slow and obvious."""
    sites = sites_of(model)
    observer = Observer(sites)
    with torch.no_grad():
        model(**text, use_cache=False)
    formula, found, layers = FORMULAS[family.name], {}, dict.fromkeys(("encoder", "decoder", "cross"), 0)
    for site in sites:
        query, key, _ = formula.project(site.module, observer.seen[site.module], site.key_size)
        scaling = site.key_size**-0.5 if formula.scaling is None else formula.scaling
        real = torch.ones(key.shape[2], dtype=torch.bool)
        if site.role == "cross":
            visible = real.expand(query.shape[2], -1)
        else:
            visible = visibility(real, site.role == "decoder", WINDOWS.get((family.name, layers[site.role])))
        layers[site.role] += 1
        bias = position_bias(site, query.shape[2], real)
        prefix = site.module.hf_prefix.hf_prefix_encoder["default"]()[0]
        with torch.no_grad():
            found[site.name] = shares(query[0], key[0], prefix, visible, scaling, bias)
    return found


def close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether shares agree."""
    return torch.allclose(got, wanted.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"prefix_init": "zero"}, {"prefix_projection": True}], ids=str)
def test_it_is_the_share_that_the_slow_reference_gives(family: Family, options: dict[str, object]) -> None:
    model = attach(family, **options)
    (text,) = texts(family, 28)
    mass = measure_attention_mass(model, [text])
    wanted = by_the_reference(model, family, text)
    assert mass.shares.keys() == wanted.keys()
    assert mass.roles == {site.name: site.role for site in sites_of(model)}
    for name, (on_prefix, on_tokens) in wanted.items():
        assert close(mass.shares[name], on_prefix.mean(dim=-1))
        assert close(1 - mass.shares[name], on_tokens.mean(dim=-1))
        assert mass.queries[name] == on_prefix.shape[-1]


def test_it_is_what_the_base_model_gives_to_the_same_prompt(causal_family: Family) -> None:
    # Within the smallest window, beyond which a prompt is forgotten and a prefix is not.
    prompt, text = rows_of_words([PREFIX_LENGTH, 10])
    start = {"prefix_init": "token_ids", "prefix_init_token_ids": prompt.tolist()}
    mass = measure_attention_mass(attach(causal_family, **start), [{"input_ids": text[None]}])
    with torch.no_grad():
        whole = build(causal_family)(torch.cat([prompt, text])[None], output_attentions=True).attentions
    for shares_of_layer, weights in zip(mass.shares.values(), whole, strict=True):
        wanted = weights[0, :, PREFIX_LENGTH:, :PREFIX_LENGTH].sum(dim=-1).mean(dim=-1)
        assert close(shares_of_layer, wanted)


@pytest.mark.parametrize("family", [LLAMA, BART], ids=lambda family: family.name)
def test_the_mean_is_over_all_queries_of_all_texts(family: Family) -> None:
    model = attach(family)
    both = measure_attention_mass(model, texts(family, 12, 5))
    long, short = (measure_attention_mass(model, [text]) for text in texts(family, 12, 5))
    for name, found in both.shares.items():
        counts = long.queries[name], short.queries[name]
        assert both.queries[name] == sum(counts)
        assert close(found, (long.shares[name] * counts[0] + short.shares[name] * counts[1]) / sum(counts), 1e-12)


def test_nothing_rests_on_an_infix_that_nobody_sees() -> None:
    *_, separator = tokens = [7, 8, 9, 6]
    model = attach(LLAMA, placement="infix", infix_separator_token_id=separator)

    def on_infix(*ids: int) -> Tensor:
        return torch.stack(list(measure_attention_mass(model, [{"input_ids": torch.tensor([ids])}]).shares.values()))

    assert not on_infix(*tokens).any()
    assert (on_infix(*tokens, 11) > 0).all()


def test_several_active_prefixes_count_together() -> None:
    model = attach(LLAMA)
    one = measure_attention_mass(model, texts(LLAMA, 9))
    model.add_adapter("more", PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_init="random"))
    assert same(measure_attention_mass(model, texts(LLAMA, 9)), one)
    model.base_model.set_adapter(["default", "more"])
    both = measure_attention_mass(model, texts(LLAMA, 9))
    assert (next(iter(both.shares.values())) > next(iter(one.shares.values()))).all()


def same(one: AttentionMass, other: AttentionMass) -> bool:
    """Whether two measurements are bit-equal."""
    return all(torch.equal(one.shares[name], other.shares[name]) for name in one.shares | other.shares)


def test_only_modules_with_the_prefix_are_measured(family: Family) -> None:
    model = attach(family, layers_to_transform=[1])
    mass = measure_attention_mass(model, texts(family, 9))
    assert len(mass.shares) == (3 if family.is_encoder_decoder else 1)
    assert all(".1." in name for name in mass.shares)


def test_embeddings_have_the_mass_of_the_keys_that_come_of_them() -> None:
    model = attach(GPT2, embedding_only=True)
    before = measure_attention_mass(model, texts(GPT2, 9))
    fold_prefix(model)
    assert same(before, measure_attention_mass(model, texts(GPT2, 9)))


def test_a_model_that_transformers_wraps_is_measured_alike_and_left_as_it_was() -> None:
    config = PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    by_peft, model = get_peft_model(build(LLAMA), config).eval(), build(LLAMA)
    model.add_adapter(config)
    mass = measure_attention_mass(model.eval(), texts(LLAMA, 9))
    # After the first call, in which transformers itself leaves hooks behind.
    hooks = hook_count(model)
    assert same(mass, measure_attention_mass(model, texts(LLAMA, 9)))
    assert same(mass, measure_attention_mass(by_peft, texts(LLAMA, 9)))
    assert hook_count(model) == hooks


def test_what_it_says_as_json() -> None:
    mass = measure_attention_mass(attach(BART), texts(BART, 9))
    found = mass.as_json()
    assert {one["role"] for one in found.values()} == {"encoder", "decoder", "cross"}
    name = mass.names_of("cross")[1]
    assert found[name] == {"role": "cross", "queries": 7, "shares": mass.shares[name].tolist()}


def test_calls_that_cannot_be_measured_are_refused() -> None:
    model = attach(LLAMA)
    rows = pad(rows_of_words([9, 5]), "left")
    with pytest.raises(UnsupportedCallError, match="A row is padded; pass rows of unequal length in inputs of their"):
        measure_attention_mass(model, [{"input_ids": rows.words, "attention_mask": rows.mask}])
    with pytest.raises(PrefixError, match="There is no input to measure attention on"):
        measure_attention_mass(model, [])
    with pytest.raises(PrefixError, match=r"in training mode.* call model.eval\(\) first"):
        measure_attention_mass(model.train(), texts(LLAMA, 9))
    with model.eval().disable_adapter(), pytest.raises(PrefixError, match="No prefix is active in the model"):
        measure_attention_mass(model, texts(LLAMA, 9))
    with pytest.raises(UnsupportedCallError, match="the model uses sdpa; load the base model with attn_impl"):
        measure_attention_mass(attach(LLAMA, "sdpa"), texts(LLAMA, 9))


REFUSED = {
    **dict.fromkeys(("causal-blt", "causal-cpmant", "causal-xlnet"), "does not return the shares of its attention"),
    **dict.fromkeys(("causal-hrm_text", "seq2seq-t5gemma2"), "runs several times in a pass"),
    # Keys of windows, blocks that are filled up, and scores in place of shares.
    **dict.fromkeys(
        ("causal-deepseek_v4", "causal-minimax_m3_vl_text", "seq2seq-prophetnet"),
        "which are no shares of 3 virtual tokens and 24 keys",
    ),
}
"""Models whose attention modules do not tell their shares, and what is said of them."""


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_tell_their_shares_are_refused(name: str) -> None:
    (entry,) = [entry for entry in zoo.entries() if entry.name == name]
    task_type = "SEQ_2_SEQ_LM" if entry.is_seq2seq else "CAUSAL_LM"
    config = PrefixConfig(task_type=task_type, num_virtual_tokens=3, prefix_init="random")
    model = get_peft_model(zoo.build(entry), config).eval()
    text = {"input_ids": zoo.words(1, 24)} | ({"decoder_input_ids": zoo.words(1, 7)} if entry.is_seq2seq else {})
    with torch.no_grad():
        # Transformers itself leaves hooks behind in the first such call.
        model(**text, output_attentions=True)
    hooks = hook_count(model)
    with pytest.raises(UnsupportedModelError, match="The attention mass cannot be measured") as refusal:
        measure_attention_mass(model, [text])
    assert REFUSED[name] in str(refusal.value)
    assert hook_count(model) == hooks


def test_a_module_that_returns_something_else_is_refused() -> None:
    model = attach(GPT2)
    # As of a module that returns scores.
    attention: nn.Module = model.get_base_model().transformer.h[0].attn
    attention.register_forward_hook(lambda module, args, output: (output[0], output[1] * 3))
    with pytest.raises(UnsupportedModelError, match=r"h.0.attn \(GPT2Attention\) returns \["):
        measure_attention_mass(model, texts(GPT2, 9))


# What a text becomes


def test_a_text_is_encoded_as_in_training() -> None:
    tokenizer, source, target = tiny_tokenizer(), "name : Aromi", "Aromi."
    for model, is_encoder_decoder in ((tiny_llama(), False), (tiny_bart(), True)):
        pair = PairEncoder(tokenizer, is_encoder_decoder).encode_pairs([(source, target)])[0]
        found = encode_text(model, tokenizer, source, target)
        assert found["input_ids"].tolist() == [pair["input_ids"]]
        assert found["attention_mask"].tolist() == [[1] * len(pair["input_ids"])]
        if is_encoder_decoder:
            assert found["decoder_input_ids"].tolist() == [[2, *pair["labels"][:-1]]]
        with torch.no_grad():
            # Of the labels the model makes what its decoder reads.
            assert torch.equal(
                model(**found).logits, model(**found | {"labels": torch.tensor([pair["labels"]])}).logits
            )


def test_without_a_target_the_model_has_read_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    template = {"prompt_template": "<{source}>"}
    found = encode_text(tiny_gpt2(), tokenizer, "tea", **template)
    assert tokenizer.decode(found["input_ids"][0]) == "<tea>"
    assert encode_text(tiny_bart(), tokenizer, "tea")["decoder_input_ids"].tolist() == [[2]]


def test_a_text_that_the_model_cannot_read_is_refused() -> None:
    tokenizer, room = tiny_tokenizer(), CONTEXT - 10
    model, options = tiny_llama(), {"prompt_template": "{source}", "num_virtual_tokens": 10}
    assert encode_text(model, tokenizer, "a" * room, **options)["input_ids"].shape == (1, room)
    with pytest.raises(DataError, match=f"The text has {room + 1} tokens, and the model reads 1 to {room} beside the"):
        encode_text(model, tokenizer, "a" * (room + 1), **options)
    with pytest.raises(DataError, match="The text has 0 tokens"):
        encode_text(model, tokenizer, "", **options)
