"""Guarantee 3 in `generate`: every way to generate gives the words of a loop of whole forward passes."""

import shutil
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    PreTrainedModel,
    QuantizedCache,
    TextIteratorStreamer,
    TextStreamer,
    cache_utils,
    pipeline,
)
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.streamers import BaseStreamer

from families import Family, build, tokens
from hf_prefix import UnsupportedCallError
from hf_prefix.attention.layer import PrefixLayer
from matrix import (
    BY_NAME,
    END,
    LENGTH,
    NEW_TOKENS,
    PREFIX_LENGTH,
    Batch,
    answer,
    assert_same,
    attach,
    greedy,
    greedy_logits,
    only_words,
    pad,
    source_batch,
)
from tiny_model import tiny_llama, tiny_tokenizer
from upstream import CACHE, PAGE_SIZE, skip_speculation

STATIC = {"cache_implementation": "static"}
NO_CACHE = {"use_cache": False}
MANY = 12
"""New words where a way to generate works on several at once."""


# --- Sampling ------------------------------------------------------------------------------------------------


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3},
    {"num_beams": 3, "num_return_sequences": 2},
]


def sample(model: PeftModel, batch: Batch, **options: Any) -> Tensor:
    torch.manual_seed(3)
    return model.generate(
        input_ids=batch.words,
        attention_mask=batch.mask,
        max_new_tokens=MANY,
        min_new_tokens=MANY,
        do_sample=True,
        **options,
    )


@pytest.mark.parametrize("options", SAMPLING, ids=["plain", "warped", "beams"])
def test_a_seed_gives_the_same_words_with_any_cache(family: Family, backend: str, options: dict[str, Any]) -> None:
    model, batch = attach(family, backend), source_batch(family)
    words = sample(model, batch, **options, **NO_CACHE)
    assert torch.equal(sample(model, batch, **options), words)
    assert torch.equal(sample(model, batch, **options, **STATIC), words)


def test_sampling_follows_the_distribution_of_whole_forward_passes(family: Family, backend: str) -> None:
    model, batch = attach(family, backend), source_batch(family)
    words = answer(model, family, batch, 1)[0]
    # So cold that only the likeliest word is drawn.
    cold = model.generate(
        input_ids=batch.words,
        attention_mask=batch.mask,
        max_new_tokens=1,
        min_new_tokens=1,
        do_sample=True,
        temperature=1e-4,
    )
    assert torch.equal(cold, words)


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_guidance_is_the_same_with_and_without_a_cache(causal_family: Family, options: dict[str, Any]) -> None:
    # The pass without the prompt has a cache of its own, and the prefix in it too.
    model, batch = attach(causal_family, "sdpa"), source_batch(causal_family)
    guided = greedy(model, batch, guidance_scale=1.5, **options)
    assert torch.equal(guided, greedy(model, batch, guidance_scale=1.5, **NO_CACHE))


# --- Prefill -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 7, LENGTH])
def test_chunked_prefill(family: Family, backend: str, size: int, options: dict[str, Any]) -> None:
    model = attach(family, backend)
    # transformers 5.23 cuts the mask of the source to the first chunk of the decoder's input, so that padding
    # would be seen, with or without a prefix.
    batch = only_words(2, LENGTH) if family.is_encoder_decoder else source_batch(family)
    assert torch.equal(greedy(model, batch, prefill_chunk_size=size, **options), answer(model, family, batch)[0])


@pytest.mark.parametrize("options", [{}, STATIC, NO_CACHE], ids=["dynamic", "static", "none"])
def test_embeddings_in_place_of_the_input(family: Family, backend: str, options: dict[str, Any]) -> None:
    model, batch = attach(family, backend), source_batch(family)
    words = model.generate(
        inputs_embeds=model.get_input_embeddings()(batch.words),
        attention_mask=batch.mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )
    # The answer leaves the input out, as there were no words in it.
    assert torch.equal(words[:, -NEW_TOKENS:], answer(model, family, batch)[0][:, -NEW_TOKENS:])


def test_everything_that_generate_can_return(family: Family) -> None:
    model, batch = attach(family), source_batch(family)
    words, logits = answer(model, family, batch)
    wanted = {name: True for name in ("output_attentions", "output_hidden_states", "output_scores", "output_logits")}
    result = greedy(model, batch, return_dict_in_generate=True, **wanted)
    assert torch.equal(result.sequences, words)
    assert_same(torch.stack(result.logits, dim=1), logits)
    attentions = result.decoder_attentions if family.is_encoder_decoder else result.attentions
    hidden = result.decoder_hidden_states if family.is_encoder_decoder else result.hidden_states
    assert len(attentions) == len(hidden) == NEW_TOKENS
    for step in attentions:
        for layer in step:
            assert layer[..., :PREFIX_LENGTH].sum(dim=-1).min() > 0
    assert hidden[1][0].shape[1] == 1


# --- Several words at once -----------------------------------------------------------------------------------


def repetitive_row() -> Batch:
    return pad([tokens(1, 7)[0].repeat(4)], "left")


def test_prompt_lookup(family: Family, backend: str) -> None:
    skip_speculation(family.name, assistant=False)
    model, batch = attach(family, backend), repetitive_row()
    words = greedy(model, batch, new_tokens=MANY, prompt_lookup_num_tokens=3)
    assert torch.equal(words, answer(model, family, batch, MANY)[0])


def assistant_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Return the model, set to propose four words at a time however sure of them it is."""
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def assisted(model: PeftModel, batch: Batch, assistant: PreTrainedModel | PeftModel) -> tuple[Tensor, int]:
    """Return the words, and in how many forward passes of the model they were found."""
    calls: list[None] = []
    handle = model.get_base_model().register_forward_hook(lambda *_: calls.append(None))
    words = greedy(model, batch, new_tokens=MANY, assistant_model=assistant_of(assistant))
    handle.remove()
    return words, len(calls)


def test_the_prefix_of_an_assistant_counts(family: Family, backend: str) -> None:
    skip_speculation(family.name, assistant=True)
    model, batch = attach(family, backend), repetitive_row()
    wanted = answer(model, family, batch, MANY)[0]
    plain, passes = assisted(model, batch, build(family, backend))
    assert torch.equal(plain, wanted)
    # The same prefix: the proposals are right, but for the end, which only the model is kept from.
    same, fewest = assisted(model, batch, attach(family, backend))
    assert torch.equal(same, wanted)
    assert fewest < passes


def test_an_assistant_with_a_prefix_of_its_own(family: Family, backend: str) -> None:
    skip_speculation(family.name, assistant=True)
    model, batch = attach(family, backend), repetitive_row()
    other = attach(family, backend, num_virtual_tokens=9, prefix_init_seed=4)
    assert torch.equal(assisted(model, batch, other)[0], answer(model, family, batch, MANY)[0])


def test_a_prefixed_assistant_of_the_base_model(family: Family, backend: str) -> None:
    skip_speculation(family.name, assistant=True)
    base, batch = build(family, backend), repetitive_row()
    words = greedy(base, batch, new_tokens=MANY, assistant_model=assistant_of(attach(family, backend)))
    assert torch.equal(words, greedy(base, batch, new_tokens=MANY, **NO_CACHE))


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_a_seed_gives_the_same_words_with_helpers(family: Family, helper: str) -> None:
    """The prefixed assistant decides which words are drawn, so two runs agree only if all state is per call."""
    skip_speculation(family.name, assistant=helper == "assistant")
    model, batch = attach(family), repetitive_row()
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if helper == "assistant":
        options = {"assistant_model": assistant_of(attach(family))}
    words = sample(model, batch, **options)
    assert torch.equal(sample(model, batch, **options), words)
    assert words.shape == (1, (1 if family.is_encoder_decoder else batch.words.shape[1]) + MANY)


# --- Streamers -----------------------------------------------------------------------------------------------


class Collector(BaseStreamer):
    """Keeps the tokens that arrive."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("options", [{}, STATIC, NO_CACHE, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_streamer_gets_the_words(family: Family, options: dict[str, Any]) -> None:
    model, batch, streamer = attach(family, "sdpa"), repetitive_row(), Collector()
    words = greedy(model, batch, streamer=streamer, **options)
    assert torch.equal(words, answer(model, family, batch)[0])
    assert streamer.ended
    assert streamer.tokens == words[0].tolist()


def prefixed_tiny_llama() -> PeftModel:
    return attach(BY_NAME["llama"], model=tiny_llama())


def wanted_text(model: PeftModel, text: str) -> str:
    """Return what the model says after a text, by whole forward passes."""
    tokenizer = tiny_tokenizer()
    words = tokenizer(text, return_tensors="pt")["input_ids"]
    said = answer(model, BY_NAME["llama"], Batch(words, torch.ones_like(words)))[0]
    return tokenizer.decode(said[0, words.shape[1] :], skip_special_tokens=True)


def test_text_streamers_give_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = prefixed_tiny_llama(), tiny_tokenizer()
    words = tokenizer("One two", return_tensors="pt")["input_ids"]
    batch, wanted = Batch(words, torch.ones_like(words)), wanted_text(model, "One two")
    greedy(model, batch, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == wanted + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = Thread(target=greedy, args=(model, batch), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == wanted
    thread.join()


# --- Pipelines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["PeftModel", "add_adapter", "load_adapter"])
def test_pipeline(way: str, tmp_path: Any) -> None:
    prefixed = prefixed_tiny_llama()
    texts = ["One two", "Three four five"]
    wanted = [wanted_text(prefixed, text) for text in texts]
    with prefixed.disable_adapter():
        assert wanted != [wanted_text(prefixed, text) for text in texts]
    model: PreTrainedModel | PeftModel = prefixed
    if way != "PeftModel":
        model = tiny_llama()
    if way == "add_adapter":
        model.add_adapter(prefixed.peft_config["default"])
        model.eval()
    if way == "load_adapter":
        prefixed.save_pretrained(tmp_path)
        model.load_adapter(tmp_path)
    speaker = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    said = speaker(texts, return_full_text=False, batch_size=2, **options)
    assert [row[0]["generated_text"] for row in said] == wanted


# --- Quantised caches ----------------------------------------------------------------------------------------


QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"backend": "fp8"},
    # Small groups and a short tail, so that words are quantised anew while others are generated.
    "quanto": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4},
}


@pytest.fixture(params=QUANTISED)
def quantisation(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Both backends that a CPU has; hqq calls deprecated functions of torch when it is imported."""
    if request.param == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this release of transformers has no fp8 cache")
    if request.param == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is in the test extra")
        if shutil.which("c++") is None:
            pytest.skip("optimum-quanto compiles an extension on first use, and there is no C++ compiler")
    return QUANTISED[request.param]


def with_prefix_on_top(cache: QuantizedCache, model: PeftModel) -> QuantizedCache:
    """Make a cache put the model's prefix in front of what it returns, whatever it does to the words."""
    layers = [module for module in model.modules() if isinstance(module, PrefixLayer)]
    prefixes = [layer.encoder("default")() for layer in layers]
    update = cache.update

    def behind_prefix(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(key, value, layer_idx, *args, **kwargs)
        front = [states.expand(key.shape[0], -1, -1, -1) for states in prefixes[layer_idx]]
        return torch.cat([front[0], keys], dim=2), torch.cat([front[1], values], dim=2)

    cache.update = behind_prefix
    return cache


@torch.no_grad()
def quantised_answer(model: PeftModel, base: PreTrainedModel, cache: QuantizedCache, words: Tensor) -> Tensor:
    """Return the logits of greedy search by the base model on such a cache, masks and positions written out."""
    cache, new, logits = with_prefix_on_top(cache, model), words, []
    for _ in range(MANY):
        places = torch.arange(words.shape[1] - new.shape[1], words.shape[1])
        hidden = torch.arange(words.shape[1])[None, :] > places[:, None]
        hidden = torch.nn.functional.pad(hidden, (PREFIX_LENGTH, 0), value=False)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        logits.append(
            base(
                input_ids=new,
                attention_mask=mask[None, None],
                position_ids=places[None] + PREFIX_LENGTH,
                **{CACHE: cache},
            ).logits[:, -1]
        )
        choices = logits[-1].clone()
        choices[:, END] = -torch.inf
        new = choices.argmax(dim=-1, keepdim=True)
        words = torch.cat([words, new], dim=1)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_quantised_cache_quantises_the_words_and_not_the_prefix(
    name: str, backend: str, quantisation: dict[str, Any]
) -> None:
    family = BY_NAME[name]
    model, batch = attach(family, backend), only_words(2, LENGTH)
    own = QuantizedCache(config=model.config, **quantisation)
    wanted = quantised_answer(model, build(family, backend), own, batch.words)
    # A copy: transformers before 5.19 writes into what it is given.
    settings = {"cache_implementation": "quantized", "cache_config": dict(quantisation)}
    assert_same(greedy_logits(model, batch, new_tokens=MANY, **settings), wanted)
    given = QuantizedCache(config=model.config, **quantisation)
    assert_same(greedy_logits(model, batch, new_tokens=MANY, **{CACHE: given}), wanted)
    exact = answer(model, family, batch, 1)[1]
    assert_same(wanted[:, :1], exact)
    assert (wanted - greedy_logits(model, batch, new_tokens=MANY)).abs().max() > 1e-3


# --- Offloaded caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from a GPU only")
def test_an_offloaded_cache(causal_family: Family, backend: str, implementation: str) -> None:
    model = attach(causal_family, backend).to("cuda")
    batch = source_batch(causal_family)
    batch = Batch(batch.words.to("cuda"), batch.mask.to("cuda"))
    wanted = greedy(model, batch, **NO_CACHE)
    options = {"cache_implementation": implementation, "disable_compile": True}
    assert torch.equal(greedy(model, batch, **options), wanted)


# --- torch.compile -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget compiled code and what was counted, before and after."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def compile_settings(backend: str = "eager") -> dict[str, Any]:
    """Return options of `generate` that compile the decoding step without a break."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    # transformers compiles by itself on accelerators only; this is how its own tests do it on a CPU.
    config._compile_all_devices = True
    return {"compile_config": config, **STATIC}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bart", "t5"])
def test_the_decoding_step_compiles_to_as_many_graphs_as_the_base_models(name: str) -> None:
    family = BY_NAME[name]
    base, batch = build(family, "sdpa"), source_batch(family)
    assert torch.equal(greedy(base, batch, **compile_settings()), greedy(base, batch, **NO_CACHE))
    of_base = graphs()
    assert of_base > 0
    torch._dynamo.reset()
    counters.clear()
    model = attach(family, "sdpa")
    words = answer(model, family, batch)[0]
    assert torch.equal(greedy(model, batch, **compile_settings()), words)
    assert graphs() == of_base
    assert torch.equal(greedy(model, batch, **compile_settings()), words)
    assert graphs() == of_base


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", [{"prefix_projection": True}, {"sliding_window": "scroll"}], ids=str)
def test_compiled_options(options: dict[str, Any]) -> None:
    family = BY_NAME["gemma3"]
    model, batch = attach(family, "sdpa", **options), source_batch(family)
    assert torch.equal(greedy(model, batch, **compile_settings()), answer(model, family, batch)[0])
    assert graphs() > 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_notices_every_change_of_the_prefix() -> None:
    family = BY_NAME["llama"]
    base, batch = build(family, "sdpa"), source_batch(family)
    plain = greedy(base, batch, **compile_settings())
    model = attach(family, model=base)

    def check() -> Tensor:
        words = greedy(model, batch, **compile_settings())
        assert torch.equal(words, answer(model, family, batch)[0])
        return words

    first = check()
    with model.disable_adapter():
        assert torch.equal(check(), plain)
    model.add_adapter("other", attach(family, num_virtual_tokens=3).peft_config["default"])
    model.set_adapter("other")
    check()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.normal_(std=2.0)
    assert not torch.equal(check(), first)
    model.set_adapter("default")
    assert torch.equal(check(), first)
    assert torch.equal(greedy(model.unload(), batch, **compile_settings()), plain)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor() -> None:
    family = BY_NAME["llama"]
    model, batch = attach(family, "sdpa"), source_batch(family)
    try:
        words = greedy(model, batch, **compile_settings("inductor"))
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("inductor needs a C++ compiler, and there is none here")
    assert torch.equal(words, answer(model, family, batch)[0])
    assert graphs() == 1


# --- Continuous batching -------------------------------------------------------------------------------------


def paging() -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{PAGE_SIZE: 16}, num_blocks=8, max_batch_tokens=32, max_blocks_per_request=4)


def in_pages(model: PreTrainedModel | PeftModel) -> list[list[int]]:
    rows = [row.tolist() for row in tokens(2, 9)]
    results = model.generate_batch(inputs=rows, continuous_batching_config=paging(), max_new_tokens=4)
    assert [result.status for result in results.values()] == [RequestStatus.FINISHED] * 2
    return [result.generated_tokens for result in results.values()]


REFUSED = r"Continuous batching \(generate_batch.*call generate with another cache, or disable the prefix"


def test_continuous_batching_is_refused_before_it_starts(causal_family: Family, backend: str) -> None:
    model = attach(causal_family, backend)
    for entry in (model, model.get_base_model()):
        with pytest.raises(UnsupportedCallError, match=REFUSED):
            in_pages(entry)
        with pytest.raises(UnsupportedCallError, match=REFUSED):
            entry.init_continuous_batching(continuous_batching_config=paging())
        with (
            pytest.raises(UnsupportedCallError, match=REFUSED),
            entry.continuous_batching_context_manager(continuous_batching_config=paging()),
        ):
            pass
        with pytest.raises(UnsupportedCallError, match=REFUSED):
            entry.generate(input_ids=tokens(2, 9), cache_implementation="paged")
    assert model.config._attn_implementation == backend


def test_continuous_batching_of_a_model_with_an_added_adapter_is_refused() -> None:
    model = build(BY_NAME["llama"])
    model.add_adapter(attach(BY_NAME["llama"]).peft_config["default"])
    with pytest.raises(UnsupportedCallError, match=REFUSED):
        in_pages(model)


def test_continuous_batching_works_while_no_prefix_is_active() -> None:
    model = attach(BY_NAME["llama"])
    with model.disable_adapter():
        off = in_pages(model)
    with pytest.raises(UnsupportedCallError, match=REFUSED):
        in_pages(model)
    base = model.unload()
    assert "init_continuous_batching" not in vars(base)
    assert in_pages(base) == off
