"""Rows that attend to one copy of the prefix get the answers of rows that each have it in front of their keys."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from families import FAMILIES, Family, build
from hf_prefix import PrefixConfig, PrefixError, UnsupportedCallError, UnsupportedModelError, set_shared_attention
from hf_prefix.attention import shared_copy
from hf_prefix.attention.layer import PrefixLayer
from matrix import (
    BY_NAME,
    PREFIX_LENGTH,
    attach,
    decoder_words,
    forward_arguments,
    greedy_logits,
    new_cache,
    only_words,
    pad,
    rows_of_words,
    source_batch,
    stepwise_logits,
)
from upstream import CACHE, FLEX_WARNINGS

pytestmark = FLEX_WARNINGS

SHARING = [family for family in FAMILIES if family.name != "t5"]
"""All but T5, whose attention is given a position bias."""
CASES = [(family, "sdpa") for family in SHARING] + [
    (family, "flex_attention") for family in SHARING if family.name != "gpt2"
]
TOLERANCE = 1e-5

Count = list[None]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Family, str]]:
    """Every family and attention implementation in which rows can share; what FlexAttention compiles runs as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield request.param


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Count:
    """A list that grows by one with each use of a shared copy."""
    calls: Count = []
    original = shared_copy.attend_to_prefixes

    def counted(*args: Any) -> Any:
        calls.append(None)
        return original(*args)

    monkeypatch.setattr(shared_copy, "attend_to_prefixes", counted)
    return calls


def layers(model: torch.nn.Module) -> list[PrefixLayer]:
    """Return our child of each attention module."""
    return [module for module in model.modules() if isinstance(module, PrefixLayer)]


def sharing(family: Family, backend: str = "sdpa", **options: Any) -> PeftModel:
    """Return a model with a prefix whose rows share it in every call that they can, the next one included."""
    model = attach(family, backend, **options)
    set_shared_attention(model, True)
    with torch.no_grad():
        model(**forward_arguments(family, only_words(1, 2)))
    return model


@torch.no_grad()
def both_ways(model: PeftModel, run: Callable[[], Any], shared: Count) -> tuple[Any, Any]:
    """Return what a run gives with the shared copy and without; check that it is used only then."""
    before = len(shared)
    with_it = run()
    used = len(shared)
    assert used > before
    set_shared_attention(model, False)
    without = run()
    assert len(shared) == used
    return with_it, without


def same(pair: tuple[Tensor, Tensor]) -> None:
    """Check that both ways give the same."""
    torch.testing.assert_close(*pair, atol=TOLERANCE, rtol=0)


def test_forward_is_the_same(case: tuple[Family, str], shared: Count) -> None:
    """In every attention module, with padding, beyond sliding windows."""
    family, backend = case
    model, batch = sharing(family, backend), source_batch(family)
    words = slice(None) if family.is_encoder_decoder else batch.real
    same(both_ways(model, lambda: model(**forward_arguments(family, batch)).logits[words], shared))
    assert len(shared) == len(layers(model))


def test_greedy_search_is_the_same(case: tuple[Family, str], shared: Count) -> None:
    """Step by step, with the default cache."""
    family, backend = case
    model, batch = sharing(family, backend), source_batch(family)
    same(both_ways(model, lambda: greedy_logits(model, batch), shared))


@pytest.mark.parametrize("family", SHARING, ids=lambda family: family.name)
def test_beams_are_the_same(family: Family, shared: Count) -> None:
    """Beams are rows, which move in the cache between the steps."""
    model, batch = sharing(family), source_batch(family)
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with_it, without = both_ways(
        model,
        lambda: model.generate(
            input_ids=batch.words,
            attention_mask=batch.mask,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        ),
        shared,
    )
    assert torch.equal(with_it.sequences, without.sequences)
    same((with_it.sequences_scores, without.sequences_scores))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", SHARING, ids=lambda family: family.name)
def test_chunks_are_the_same(family: Family, kind: str, shared: Count) -> None:
    """A prompt in pieces, on the default cache and on one with empty slots."""
    model, batch = sharing(family), source_batch(family)
    words = decoder_words(2, 30)

    def run() -> Tensor:
        cache = new_cache(kind, model, family, 40, batch.words.shape[1])
        return stepwise_logits(model, family, batch, words, cache, [11, 1, 8, 9, 1])

    same(both_ways(model, run, shared))


def test_left_padding_makes_no_difference() -> None:
    """Queries of padding see no real token, and a row of words is what it is alone."""
    family = BY_NAME["llama"]
    model, rows = sharing(family), rows_of_words([30, 4])
    with torch.no_grad():
        together = model(**forward_arguments(family, pad(rows, "left"))).logits
        alone = model(**forward_arguments(family, pad(rows[1:], "left"))).logits
    assert together.isfinite().all()
    same((together[1:, -4:], alone))


def test_second_turn_with_another_prefix(shared: Count) -> None:
    """The cache keeps real tokens only, so that the prefix in front of them can change, and how."""
    family = BY_NAME["llama"]
    model = sharing(family)
    model.add_adapter("other", PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_init="random"))
    first, second = decoder_words(3, 9), decoder_words(3, 8)

    def run(turns: list[bool]) -> tuple[Tensor, Any]:
        cache, logits = new_cache("dynamic", model, family, 0, 0), []
        for name, words, use in zip(("default", "other"), (first, second), turns, strict=True):
            model.set_adapter(name)
            set_shared_attention(model, use)
            logits.append(model(input_ids=words, use_cache=True, **{CACHE: cache}).logits)
        return torch.cat(logits, dim=1), cache

    with torch.no_grad():
        wanted, _ = run([False, False])
        for turns in ([True, True], [True, False], [False, True]):
            before = len(shared)
            found, cache = run(turns)
            assert len(shared) - before == 2 * sum(turns)
            same((found, wanted))
            assert cache.get_seq_length() == 17
            assert all(layer.keys.shape[-2] == 17 for layer in cache.layers)
    # A copy of the model has state of its own.
    other = copy.deepcopy(model)
    set_shared_attention(other, True)
    with torch.no_grad():
        same((other(input_ids=first).logits, model(input_ids=first).logits))
    assert layers(model)[0].shared_copy.chosen is True


MIX = ["short", "__base__", "long", "short", "long"]
LENGTHS = {"short": 3, "long": 9}


def with_two_prefixes(name: str, **options: Any) -> PeftModel:
    """Return a model with two further prefixes, of different lengths."""
    family = BY_NAME[name]
    model = sharing(family, **options)
    for adapter, length in LENGTHS.items():
        config = PrefixConfig(task_type=family.task_type, num_virtual_tokens=length, prefix_init="random")
        model.add_adapter(adapter, config)
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bart"])
def test_rows_of_different_prefixes_share_those_they_have_in_common(name: str, shared: Count) -> None:
    """Rows without a prefix among them, with padding, in a forward pass, step by step and with beams."""
    family, model = BY_NAME[name], with_two_prefixes(name)
    batch = pad(rows_of_words([30, 12, 21, 5, 9]), "right" if family.is_encoder_decoder else "left")
    words = slice(None) if family.is_encoder_decoder else batch.real

    def run() -> Tensor:
        whole = model(**forward_arguments(family, batch), adapter_names=MIX).logits
        assert whole.isfinite().all()
        steps = greedy_logits(model, batch, adapter_names=MIX)
        beams = greedy_logits(model, batch, adapter_names=MIX, num_beams=2)
        return torch.cat([part.flatten() for part in (whole[words], steps, beams)])

    same(both_ways(model, run, shared))


def test_prepared_prefixes_of_rows_are_kept_and_not_repeated() -> None:
    """Each prefix is there once, whole and of its own length, for as long as rows and parameters stay."""
    model = with_two_prefixes("llama", dtype=torch.bfloat16)
    layer, like, found = layers(model)[0], torch.zeros(1, dtype=torch.bfloat16), []
    handle = layer._site_module[0].register_forward_pre_hook(
        lambda *_: found.append(layer._prepared.groups_like(like))
    )
    words = decoder_words(5, 4)
    with torch.no_grad():
        for names in (MIX, MIX, MIX[::-1], ["long"] * 5):
            model(input_ids=words, adapter_names=names)
        layer.encoder("long").sources()[0].mul_(2)
        model(input_ids=words, adapter_names=MIX)
    handle.remove()
    assert found[1] is found[0]
    assert [(group.rows.tolist(), group.prefix.length) for group in found[0]] == [([0, 3], 3), ([2, 4], 9)]
    assert {tuple(group.rows.tolist()): group.prefix.length for group in found[2]} == {(1, 4): 3, (0, 2): 9}
    assert [(group.rows, group.prefix.length) for group in found[3]] == [(None, 9)]
    assert torch.equal(found[4][1].prefix.key, 2 * found[0][1].prefix.key)


class LargestOutput(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        found = function(*args, **(kwargs or {}))
        tensors = found if isinstance(found, (tuple, list)) else (found,)
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))])
        return found


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_no_step_makes_a_copy_for_each_row(name: str) -> None:
    """With the shared copy no operation of a decoding step returns as much as a prefix for each row."""
    family, rows, length = BY_NAME[name], 8, 300
    model = sharing(family, num_virtual_tokens=length)
    batch = only_words(rows, 6)
    key = next(iter(layers(model)[0].encoder("default").sources()))
    largest = {}
    for use in (True, False):
        set_shared_attention(model, use)
        cache = new_cache("dynamic", model, family, 0, 0)
        with torch.no_grad():
            stepwise_logits(model, family, batch, decoder_words(rows, 5), cache, [5])
            with LargestOutput() as seen:
                stepwise_logits(model, family, batch, decoder_words(rows, 1), cache, [1])
        largest[use] = seen.elements
    assert largest[True] < rows * key.numel() <= largest[False]


def test_prefix_of_a_long_decoding_is_kept_once() -> None:
    """All steps attend to the very tensor that was prepared once, and the cache holds no prefix beside its tokens."""
    family = BY_NAME["llama"]
    model = sharing(family, num_virtual_tokens=50)
    cache = new_cache("dynamic", model, family, 0, 0)
    with torch.no_grad():
        model(input_ids=decoder_words(4, 6), use_cache=True, **{CACHE: cache})
        prepared = layers(model)[0].prefix_like(cache.layers[0].keys)
        model(input_ids=decoder_words(4, 1), use_cache=True, **{CACHE: cache})
        assert layers(model)[0].prefix_like(cache.layers[0].keys) is prepared
    held = cache.layers[0].keys.untyped_storage().nbytes()
    assert held == cache.layers[0].keys.numel() * 4 == 4 * 2 * 7 * 8 * 4


def test_is_not_used_in_training_or_with_gradients(shared: Count) -> None:
    """There the prefix is in front of the keys, and learns."""
    family = BY_NAME["llama"]
    model = sharing(family)
    arguments = forward_arguments(family, only_words(2, 6))
    shared.clear()
    model(**arguments, labels=arguments["input_ids"]).loss.backward()
    assert all(source.grad is not None for layer in layers(model) for source in layer.encoder("default").sources())
    model.train()
    with torch.no_grad():
        model(**arguments)
    assert not shared
    model.eval()
    with torch.inference_mode():
        model(**arguments)
    assert len(shared) == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma3", {"sliding_window": "scroll"}),
        ("llama", {"placement": "infix", "infix_separator_token_id": 6}),
        ("t5", {}),
    ],
)
def test_is_not_used_where_the_prefix_is_not_simply_in_front(
    name: str, options: dict[str, Any], shared: Count
) -> None:
    """A prefix that scrolls, an infix, or a position bias: the answers are those without a choice."""
    family = BY_NAME[name]
    model, batch = attach(family, "sdpa", **options), only_words(2, 20)
    batch.words[:, 3] = 6
    with torch.no_grad():
        wanted = model(**forward_arguments(family, batch)).logits
        set_shared_attention(model, True)
        for _ in range(2):
            same((model(**forward_arguments(family, batch)).logits, wanted))
    # In Gemma 3, one of two layers has no window.
    assert len(shared) == (2 if name == "gemma3" else 0)


def test_eager_attention_stays_as_it_is(shared: Count) -> None:
    """It is no function that modules look up."""
    family = BY_NAME["llama"]
    model = sharing(family, "eager")
    assert not shared
    model.get_base_model().set_attn_implementation("sdpa")
    same(
        both_ways(
            model, lambda: [model(**forward_arguments(family, only_words(2, 9))).logits for _ in "ab"][1], shared
        )
    )


def test_default_is_where_it_pays(shared: Count) -> None:
    """Many rows or a long prefix share; few rows with a short one do not."""
    family = BY_NAME["llama"]
    model = attach(family, "sdpa", num_virtual_tokens=80)
    with torch.no_grad():
        # The first call, in which the modules are looked at, may be a short one.
        for rows, used in ((1, 0), (7, 0), (8, 2), (2, 2)):
            model(**forward_arguments(family, only_words(rows, 3)))
            assert len(shared) == used


class Table(AttentionInterface):
    """A table of attention functions that hands out what a test wants instead of what is looked up."""

    def __init__(self, replace: Callable[[Any], Any]) -> None:
        super().__init__()
        self._replace = replace

    def get_interface(self, attn_implementation: str, default: Any) -> Any:
        """Return the function of a name, replaced."""
        return self._replace(super().get_interface(attn_implementation, default))


def test_module_that_changes_keys_does_not_share(monkeypatch: pytest.MonkeyPatch, shared: Count) -> None:
    """What happens to keys behind the cache would have to happen to the prefix, too."""

    def turned(function: Any) -> Any:
        return lambda module, query, key, *more, **options: function(module, query, key.flip(-1), *more, **options)

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Table(turned))
    family = BY_NAME["llama"]
    model = attach(family, "sdpa")
    arguments = forward_arguments(family, only_words(2, 9))
    with torch.no_grad():
        wanted = model(**arguments).logits
        set_shared_attention(model, True)
        for _ in range(2):
            assert torch.equal(model(**arguments).logits, wanted)
    assert not shared


def test_prefix_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that does without its attention function all at once, or asks it for more, raises; then it is whole."""
    family = BY_NAME["llama"]
    model = sharing(family)
    arguments = forward_arguments(family, only_words(2, 9))
    sdpa = AttentionInterface()["sdpa"]
    with torch.no_grad():
        monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Table(lambda _: sdpa))
        with pytest.raises(UnsupportedCallError, match=r"LlamaAttention did without .*set_shared_attention"):
            model(**arguments)
        with_softcap = Table(lambda function: lambda *args, **more: function(*args, **more, softcap=30.0))
        monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", with_softcap)
        with pytest.raises(UnsupportedCallError, match=r"LlamaAttention asks .*softcap.*set_shared_attention"):
            model(**arguments)
        monkeypatch.undo()
        assert all(layer._site_module[0].config is model.config for layer in layers(model))
        with_it = model(**arguments).logits
        set_shared_attention(model, False)
        same((with_it, model(**arguments).logits))


def test_choice_needs_a_prefix_that_can_be_shared() -> None:
    """A choice that could change nothing raises."""
    with pytest.raises(PrefixError, match="has no prefix; attach one first"):
        set_shared_attention(build(BY_NAME["llama"]), True)
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = get_peft_model(
        transformers.BloomForCausalLM(config), PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_LENGTH)
    )
    set_shared_attention(model, None)
    with pytest.raises(UnsupportedModelError, match="No attention module of this model attends by scores"):
        set_shared_attention(model, True)


def test_packed_rows_are_still_refused() -> None:
    """OPT does not keep packed sequences apart, whichever way the prefix is attended to."""
    model = sharing(BY_NAME["opt"])
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="does not keep its sequences apart"):
        model(input_ids=decoder_words(1, 5), position_ids=positions, use_cache=False)
