"""The hooked attention modules against the slow reference: outputs, gradients, masks, cached steps."""

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from families import VOCABULARY, Family, build
from formulas import FORMULAS, WINDOWS, Observed, Observer, position_bias
from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.attention.masks import Extent, causal_mask
from hf_prefix.attention.sites import AttentionSite
from hf_prefix.attention.tuner_layer import prefixes_off
from matrix import PREFIX_LENGTH, Batch, attach, decoder_words, new_cache, pad, rows_of_words
from reference import attend, visibility
from upstream import CACHE

TOLERANCE = 1e-6
"""Largest difference in float32, as a share of the largest number where that is above 1 (T5 does not scale)."""

LENGTHS = [28, 17]
"""Longer than the sliding windows of the families."""


def expected(
    name: str, site: AttentionSite, layer: int, seen: Observed, real: Tensor, prefix: tuple[Tensor, Tensor]
) -> Tensor:
    """Return what the module shall give, by the reference [row, query, model size].

    Args:
        name: The family's name.
        site: The attention module.
        layer: Its place among those of its role.
        seen: What went into it.
        real: Which keys are no padding [row, key].
        prefix: Its prefix's key and value.
    """
    formula = FORMULAS[name]
    query, key, value = formula.project(site.module, seen, site.key_size)
    scaling = site.key_size**-0.5 if formula.scaling is None else formula.scaling
    rows = []
    for row in range(len(query)):
        bias = position_bias(site, query.shape[2], real[row])
        if site.role == "cross":
            visible = real[row].expand(query.shape[2], -1)
        else:
            visible = visibility(real[row], site.role == "decoder", WINDOWS.get((name, layer)))
        rows.append(attend(query[row], key[row], value[row], *prefix, visible, scaling, bias))
    return getattr(site.module, formula.output)(torch.stack(rows))


def run(model: PeftModel, family: Family, batch: Batch, cached: bool) -> None:
    """Run a batch through the model, at once or in a prefill and two steps on a cache."""
    words = decoder_words(len(batch.words)) if family.is_encoder_decoder else batch.words
    mask = {"attention_mask": batch.mask}
    if not family.is_encoder_decoder and not cached:
        model(input_ids=words, use_cache=False, **mask)
        return
    if not cached:
        model(input_ids=batch.words, decoder_input_ids=words, use_cache=False, **mask)
        return
    cache = new_cache("dynamic", model, family, 0, 0)
    chunks = words.split([words.shape[1] - 2, 1, 1], dim=1)
    if family.is_encoder_decoder:
        encoded = model.get_base_model().get_encoder()(input_ids=batch.words, **mask)
        for chunk in chunks:
            model(encoder_outputs=encoded, decoder_input_ids=chunk, **{CACHE: cache}, **mask)
        return
    length = 0
    for chunk in chunks:
        length += chunk.shape[1]
        model(input_ids=chunk, attention_mask=batch.mask[:, :length], **{CACHE: cache})


def check(model: PeftModel, family: Family, name: str, batch: Batch, cached: bool) -> None:
    """Compare every attention module of the model with the reference, gradients of the prefix included."""
    base = model.get_base_model()
    with prefixes_off(base):
        sites = find_sites(base)
    observer = Observer(sites)
    run(model, family, batch, cached)
    layers = dict.fromkeys(("encoder", "decoder", "cross"), 0)
    for site in sites:
        seen = observer.seen[site.module]
        all_real = torch.ones(seen.hidden.shape[:2], dtype=torch.bool)
        is_source = site.role != "decoder" or not family.is_encoder_decoder
        keys_real = batch.real if is_source else all_real
        queries_real = all_real if site.role == "cross" else keys_real
        prefix = parameters(site)
        wanted = expected(name, site, layers[site.role], seen, keys_real, prefix)
        layers[site.role] += 1
        got = seen.output[queries_real]
        assert_same(got, wanted[queries_real], site)
        direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
        got_slopes = torch.autograd.grad((got * direction).mean(), prefix, retain_graph=True)
        wanted_slopes = torch.autograd.grad((wanted[queries_real] * direction).mean(), prefix, retain_graph=True)
        for got_slope, wanted_slope in zip(got_slopes, wanted_slopes, strict=True):
            assert wanted_slope.abs().max() > 1e-4
            assert_same(got_slope, wanted_slope, site)


def parameters(site: AttentionSite) -> tuple[Tensor, Tensor]:
    layer = site.module.hf_prefix
    assert isinstance(layer, PrefixLayer)
    encoder = layer.hf_prefix_encoder["default"]
    return encoder.key, encoder.value


def assert_same(got: Tensor, wanted: Tensor, site: AttentionSite) -> None:
    allowed = TOLERANCE * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(got, wanted, atol=allowed, rtol=0, msg=lambda text: f"{site.name}: {text}")


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_every_attention_module_is_the_reference(family: Family, backend: str, padding: str, cached: bool) -> None:
    rows = rows_of_words([28, 28] if padding == "none" else LENGTHS)
    check(attach(family, backend), family, family.name, pad(rows, padding), cached)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_grouped_query_attention_is_the_reference(backend: str, kv_heads: int, cached: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        pad_token_id=0,
    )
    family = Family("llama", lambda: transformers.LlamaForCausalLM(config), False, {})
    check(attach(family, backend), family, "llama", pad(rows_of_words(LENGTHS), "left"), cached)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("empty_slots", [0, 2])
def test_the_mask_that_stands_for_none_is_causal(past: int, empty_slots: int) -> None:
    length = past + 4
    extent = Extent(4, past, length + empty_slots, 0, has_empty_slots=empty_slots > 0)
    mask = causal_mask(PREFIX_LENGTH, extent, torch.device("cpu"))[0, 0]
    assert mask[:, :PREFIX_LENGTH].all()
    wanted = visibility(torch.ones(length + empty_slots, dtype=torch.bool), causal=True)[past:length]
    assert torch.equal(mask[:, PREFIX_LENGTH:], wanted)


def test_the_reference_without_a_prefix_is_the_base_model(family: Family) -> None:
    # Guards the tests above: the same formulas with a prefix of length 0 must give the plain modules' outputs.
    model = build(family)
    sites = find_sites(model)
    observer = Observer(sites)
    batch = pad(rows_of_words([28, 28]), "none")
    words = {"decoder_input_ids": decoder_words(2)} if family.is_encoder_decoder else {}
    model(input_ids=batch.words, use_cache=False, **words)
    layers = dict.fromkeys(("encoder", "decoder", "cross"), 0)
    for site in sites:
        if site.bias_owner is None:
            seen = observer.seen[site.module]
            key_length = batch.words if site.role != "decoder" or not words else words["decoder_input_ids"]
            real = torch.ones_like(key_length, dtype=torch.bool)
            empty = (torch.zeros(site.heads, 0, site.key_size), torch.zeros(site.heads, 0, site.value_size))
            wanted = expected(family.name, site, layers[site.role], seen, real, empty)
            assert_same(seen.output, wanted, site)
        layers[site.role] += 1
