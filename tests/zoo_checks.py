"""What a prefix must do on any model, as checks that say of one model: holds, does not apply (and why), or fails.

A check does not apply where the base model itself has not got the property, for example where it answers differently
with and without its own cache.
"""

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix import PrefixConfig, fold_prefix, set_shared_attention
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.attention.masks import Extent
from hf_prefix.attention.sites import ENCODER_STATES_ARGUMENTS, forward_parameters, selecting_module, sliding_window
from hf_prefix.attention.tuner_layer import CHILD_NAME
from hf_prefix.attention.visibility import Visibility
from hf_prefix.errors import PrefixError, UnsupportedCallError, UnsupportedModelError
from upstream import CACHE
from zoo import FIRST_WORD, PAD, START, WINDOW, Entry, build, words
from zoo_inputs import NEEDS_MORE_THAN_TEXT, text_inputs
from zoo_inputs import inputs as real_inputs

PREFIX_LENGTH = 5
LENGTH = 24
"""Length of the inputs, beyond the sliding windows of the tiny models."""
NEW_TOKENS = 4
TOLERANCE = 1e-4
"""Largest difference of logits between two ways to the same numbers, relative to the largest logit.

Reached: 2e-6 for prompts and padding; 5e-5 for the cache of Nemotron-H, whose base model differs by 3e-5 itself.
"""


_RECURRENT = "its other layers carry the prompt on in a state, which a prefix does not enter"
_CONVOLUTION = "it mixes each token with those before it by a convolution, which a prefix does not enter"
NO_PROMPT = {
    **dict.fromkeys(("causal-bailing_hybrid", "causal-bamba", "causal-falcon_h1"), _RECURRENT),
    **dict.fromkeys(("causal-granitemoehybrid", "causal-jamba", "causal-kimi_linear"), _RECURRENT),
    **dict.fromkeys(
        ("causal-lara_mini", "causal-minimax", "causal-nemotron_h", "causal-olmo_hybrid", "causal-qwen3_5"), _RECURRENT
    ),
    **dict.fromkeys(("causal-qwen3_5_moe", "causal-qwen3_5_moe_text", "causal-qwen3_5_text"), _RECURRENT),
    **dict.fromkeys(("causal-qwen3_next", "causal-qwen4_exp", "causal-qwen4_exp_text"), _RECURRENT),
    **dict.fromkeys(("causal-recurrent_gemma", "causal-zamba", "causal-zamba2"), _RECURRENT),
    "seq2seq-nemo_speechlm": _RECURRENT,
    **dict.fromkeys(("causal-lfm2", "causal-lfm2_moe", "causal-lfm3"), _CONVOLUTION),
    **dict.fromkeys(("causal-inkling_text", "causal-inkling2_text", "causal-zaya"), _CONVOLUTION),
    "causal-inkling2_loop_text": _CONVOLUTION,
    "causal-deepseek_v4": "it compresses windows of the prompt to further keys, of which a prefix has none",
    "seq2seq-voxtral_realtime": "a piece of audio is added to every token of a prompt, and to no virtual token",
}
"""Why a prompt is more than its keys and values, by entry; each is checked to be so."""


class NotApplicable(Exception):
    """The base model itself has not got the property that is checked."""


@dataclass(frozen=True)
class Outcome:
    """Result of one check.

    Args:
        mark: "yes", "-" where the check does not apply, "refused" by an error that says why, or "NO".
        reason: Why it does not apply, the error, or how it failed.
    """

    mark: str
    reason: str = ""


def same(got: Tensor, wanted: Tensor) -> bool:
    """Whether two ways to the same logits agree."""
    return difference(got, wanted) <= TOLERANCE


def difference(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest of the numbers (at least 1)."""
    scale = max(1.0, float(wanted.abs().max()))
    return float((got - wanted).abs().max()) / scale


class Subject:
    """One tiny model with a prefix of random numbers, and ways to ask it.

    Args:
        entry: The model's entry.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.base = build(entry)
        self.model = attach(build(entry), prefix_init="random")
        # The rows of some models have several tokens at each place.
        self.inputs: Tensor = text_inputs(entry.name, self.base, 2, LENGTH)["input_ids"]

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.base.config.is_encoder_decoder)

    def takes(self, argument: str) -> bool:
        """Whether the model's forward names an argument."""
        return argument in inspect.signature(type(self.base).forward).parameters

    def logits(self, model: torch.nn.Module, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Return the logits of a forward pass without a cache."""
        if self.entry.name in NEEDS_MORE_THAN_TEXT:
            more = text_inputs(self.entry.name, self.base, len(input_ids), input_ids.shape[1])
            arguments = {name: value for name, value in more.items() if name != "input_ids"} | arguments
        if self.is_encoder_decoder:
            decoder = arguments.pop("decoder_input_ids", None)
            arguments["decoder_input_ids"] = decoder_words(len(input_ids)) if decoder is None else decoder
        if self.takes("use_cache"):
            arguments.setdefault("use_cache", False)
        result: Tensor = model(input_ids=input_ids, **arguments).logits
        return result

    @cached_property
    def prefixed(self) -> Tensor:
        with torch.no_grad():
            return self.logits(self.model, self.inputs)


def attach(model: PreTrainedModel, **options: Any) -> PeftModel:
    """Return the model with a prefix, in evaluation mode."""
    options = {"num_virtual_tokens": PREFIX_LENGTH} | options
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    with warnings.catch_warnings():
        # What the encoder cannot do is said in the table.
        warnings.filterwarnings("ignore", message="The encoder of")
        return get_peft_model(model, PrefixConfig(task_type=task_type, **options)).eval()


def decoder_words(rows: int, length: int = 7) -> Tensor:
    """Return inputs of a decoder [rows, length]; the rows differ."""
    tokens = words(rows, length, seed=20)
    tokens[:, 0] = START
    return tokens


def check_forward(subject: Subject) -> None:
    """The prefix changes the logits and nothing about their form."""
    with torch.no_grad():
        base = subject.logits(subject.base, subject.inputs)
    assert subject.prefixed.shape == base.shape, f"shape {list(subject.prefixed.shape)}"
    assert subject.prefixed.isfinite().all(), "not finite"
    assert difference(subject.prefixed, base) > 10 * TOLERANCE, "no effect"


def check_off(subject: Subject) -> None:
    """Switched off, the logits are the base model's, bit for bit."""
    with torch.no_grad():
        for parameter in subject.base.parameters():
            parameter.requires_grad_(False)
        base = subject.logits(subject.base, subject.inputs)
        with subject.model.disable_adapter():
            off = subject.logits(subject.model, subject.inputs)
    assert torch.equal(off, base), f"differs by {difference(off, base):.1e}"


def gradients(subject: Subject, model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients of everything that is trained, by name."""
    model.zero_grad()
    # Dropout draws the same numbers each time.
    torch.manual_seed(0)
    logits = subject.logits(model, subject.inputs)
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def check_gradients(subject: Subject) -> None:
    """Every tensor of the prefix learns, nothing else does."""
    _check_all_learn(subject, subject.model)


def check_projection(subject: Subject) -> None:
    """So does every tensor of the paper's MLP, and without it the logits stay the same."""
    model = attach(build(subject.entry), prefix_projection=True, encoder_hidden_size=8)
    _check_all_learn(subject, model)
    with torch.no_grad():
        wanted = subject.logits(model, subject.inputs)
        fold_prefix(model)
        found = subject.logits(model, subject.inputs)
    assert same(found, wanted), f"differs by {difference(found, wanted):.1e}"


def _check_all_learn(subject: Subject, model: PeftModel) -> None:
    found = gradients(subject, model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    dead = [name for name in trainable if name not in found or not bool((found[name] != 0).any())]
    assert not dead, f"no gradient: {sorted(dead)[:2]}, {len(dead)} of {len(trainable)}"
    assert all("hf_prefix" in name for name in trainable), "the base model is trained"


def check_checkpointing(subject: Subject) -> None:
    """Gradient checkpointing changes no gradient, reentrant or not."""
    if not subject.base.supports_gradient_checkpointing:
        raise NotApplicable("no gradient checkpointing in the base model")
    failures = []
    for reentrant in (False, True):
        failure = checkpointing_fails(subject, subject.model, reentrant)
        if failure and any(checkpointing_fails(subject, model, reentrant) for model in _base_in_training(subject)):
            failures.append(f"{'reentrant' if reentrant else 'any'} checkpointing fails in the base model")
        else:
            assert not failure, failure
    if failures:
        raise NotApplicable(failures[0])


def _base_in_training(subject: Subject) -> Iterator[PreTrainedModel]:
    """Yield the base model trained as a whole, and frozen as a PEFT method has it."""
    yield build(subject.entry)
    yield build(subject.entry).requires_grad_(False)


def checkpointing_fails(subject: Subject, model: torch.nn.Module, reentrant: bool) -> str:
    """Return how gradients with checkpointing differ from those without; "" where they do not."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    model.train()
    # On both sides, since some models fail with this alone.
    inner.enable_input_require_grads()
    try:
        plain = gradients(subject, model)
        inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients(subject, model)
    except (RuntimeError, UnsupportedCallError) as error:
        return f"reentrant={reentrant}: {error}"
    finally:
        inner.gradient_checkpointing_disable()
        inner.disable_input_require_grads()
    if found.keys() != plain.keys():
        return f"reentrant={reentrant}: lost gradients"
    differences = {name: difference(found[name], gradient) for name, gradient in plain.items()} | {"": 0.0}
    worst = max(differences, key=lambda name: differences[name])
    return "" if differences[worst] <= TOLERANCE else f"reentrant={reentrant}: {worst} {differences[worst]:.1e}"


@torch.no_grad()
def stepwise(subject: Subject, model: torch.nn.Module) -> Tensor:
    """Return logits with the model's own cache: a first chunk, then one by one."""
    arguments: dict[str, Any] = {"use_cache": True}
    name = "input_ids"
    tokens = subject.inputs
    if subject.is_encoder_decoder:
        name, tokens = "decoder_input_ids", decoder_words(2)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        arguments["encoder_outputs"] = base.get_encoder()(input_ids=subject.inputs)
        arguments["attention_mask"] = torch.ones_like(subject.inputs)
    first = tokens.shape[1] - 3
    parts, cache = [], None
    for part in tokens.split([first, 1, 1, 1], dim=1):
        output = model(**{name: part}, **arguments, **({} if cache is None else {CACHE: cache}))
        cache = getattr(output, CACHE, None)
        if cache is None:
            raise NotApplicable("the base model has no cache")
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def check_cache(subject: Subject) -> None:
    """Decoding with the model's cache equals one forward pass."""
    with torch.no_grad():
        base = subject.logits(subject.base, subject.inputs)
    cached = _base_can(lambda: stepwise(subject, subject.base), "step by step with its cache")
    if not same(cached, base):
        raise NotApplicable("the base model's cache differs from its forward pass")
    found = stepwise(subject, subject.model)
    assert same(found, subject.prefixed), f"differs by {difference(found, subject.prefixed):.1e}"


def _base_can(call: Callable[[], Tensor], what: str) -> Tensor:
    """Return what the base model gives, or say that it cannot."""
    try:
        return call()
    except NotApplicable:
        raise
    except Exception as error:
        raise NotApplicable(f"the base model fails {what}: {type(error).__name__}") from error


def padded(subject: Subject, model: torch.nn.Module, positions: bool) -> tuple[Tensor, Tensor]:
    """Return the logits of the words of a row in a padded batch, and of the row alone."""
    short = subject.inputs[:1, : LENGTH - 4]
    arguments: dict[str, Any] = {}
    side = "right" if subject.is_encoder_decoder else "left"
    padding = torch.full((1, 4), PAD)
    row = torch.cat([short, padding] if side == "right" else [padding, short], dim=1)
    mask = torch.stack([(row[0] != PAD).long(), torch.ones(LENGTH, dtype=torch.long)])
    if positions and subject.takes("position_ids"):
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = subject.logits(model, torch.cat([row, subject.inputs[1:]]), attention_mask=mask, **arguments)
    alone = subject.logits(model, short, attention_mask=torch.ones_like(short))
    return (batch[:1] if subject.is_encoder_decoder else batch[:1, 4:]), alone[:1]


@torch.no_grad()
def check_padding(subject: Subject) -> None:
    """A row of a padded batch gets the logits of the row alone."""
    if not subject.takes("attention_mask"):
        raise NotApplicable("the base model takes no padding mask")
    try:
        batch, alone = padded(subject, subject.base, positions=True)
    except RuntimeError as error:
        raise NotApplicable("the base model fails with a padded batch") from error
    if batch.shape != alone.shape or not same(batch, alone):
        raise NotApplicable("padding changes the base model's own logits")
    batch, alone = padded(subject, subject.model, positions=False)
    assert same(batch, alone), f"differs by {difference(batch, alone):.1e}"


@torch.no_grad()
def check_rows(subject: Subject) -> None:
    """In a batch of a row without a prefix and one with, each gets its own logits."""
    decoder = {"decoder_input_ids": decoder_words(2)} if subject.is_encoder_decoder else {}
    base = subject.logits(subject.base, subject.inputs, **decoder)
    wanted = torch.cat([base.chunk(2)[0], subject.prefixed.chunk(2)[1]])
    found = subject.logits(subject.model, subject.inputs, adapter_names=["__base__", "default"], **decoder)
    assert same(found, wanted), f"differs by {difference(found, wanted):.1e}"


@torch.no_grad()
def check_prompt(subject: Subject) -> None:
    """A prefix taken from real tokens is a prompt of these tokens, within every window."""
    _check_prompt(subject, WINDOW - PREFIX_LENGTH)


@torch.no_grad()
def check_scroll(subject: Subject) -> None:
    """Beyond a sliding window, a prefix that scrolls is a prompt."""
    attention = _attention(subject.model)
    if not any(sliding_window(module) for module in attention):
        # Nothing to say in the table.
        raise NotApplicable("")
    if any(selecting_module(module) for module in attention):
        raise NotApplicable("its other layers select among the tokens of a prompt, and the whole prefix always")
    _check_prompt(subject, LENGTH, sliding_window="scroll")


def _check_prompt(subject: Subject, length: int, **options: Any) -> None:
    if subject.is_encoder_decoder:
        raise NotApplicable("an encoder-decoder model has no prompt that both of its halves see")
    check_causal(subject)
    words = subject.inputs[:, -length:]
    prompt = words[:1, :0].new_tensor(list(range(FIRST_WORD, FIRST_WORD + PREFIX_LENGTH)))
    init = {"prefix_init": "token_ids", "prefix_init_token_ids": prompt.tolist()}
    try:
        model = attach(build(subject.entry), **init, **options)
    except UnsupportedModelError:
        raise
    except PrefixError as error:
        raise NotApplicable(str(error)) from error
    wanted = subject.logits(subject.base, torch.cat([prompt.expand(len(words), -1), words], dim=1))
    found = subject.logits(model, words)
    wanted = wanted[:, -found.shape[1] :]
    differs = difference(found, wanted)
    reason = NO_PROMPT.get(subject.entry.name)
    if reason is not None:
        assert differs > TOLERANCE, "is a prompt, although zoo_checks.py says that it cannot be"
        raise NotApplicable(reason)
    assert differs <= TOLERANCE, f"differs by {differs:.1e}"


def check_causal(subject: Subject) -> None:
    """Raise where a token of the base model sees later ones: what is in front of a text depends on the text then."""
    later = subject.inputs.clone()
    later[:, 2:] = later[:, 2:].flip(1)
    logits = [subject.logits(subject.base, tokens)[:, :2] for tokens in (subject.inputs, later)]
    if not same(*logits):
        raise NotApplicable("a token of the base model sees later ones")


def _attention(model: PeftModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, CHILD_NAME, None), PrefixLayer)]


@torch.no_grad()
def check_hidden(subject: Subject) -> None:
    """Where no token may see the prefix, nothing is left of it: real tokens stand to each other as in the base."""
    try:
        model = attach(build(subject.entry), prefix_init="random", offset_positions=False)
    except UnsupportedModelError:
        # Positions are relative here and move for no prefix.
        model = attach(build(subject.entry), prefix_init="random")
    # Encoders of some families take a mask in their own form only, so they get one to start from.
    mask = {"attention_mask": torch.ones_like(subject.inputs)} if subject.is_encoder_decoder else {}
    with hidden_prefix():
        found = subject.logits(model, subject.inputs, **mask)
    wanted = subject.logits(subject.base, subject.inputs, **mask)
    assert same(found, wanted), f"differs by {difference(found, wanted):.1e}"


@torch.no_grad()
def check_moved(subject: Subject) -> None:
    """Where positions are relative, that holds behind a prefix that moves them, too."""
    if subject.is_encoder_decoder or not subject.takes("position_ids"):
        raise NotApplicable("")
    base = subject.logits(subject.base, subject.inputs)
    moved = torch.arange(PREFIX_LENGTH, PREFIX_LENGTH + subject.inputs.shape[1]).expand(subject.inputs.shape)
    if not same(_base_can(lambda: subject.logits(subject.base, subject.inputs, position_ids=moved), "moved"), base):
        raise NotApplicable("")
    with hidden_prefix():
        found = subject.logits(subject.model, subject.inputs)
    assert same(found, base), f"differs by {difference(found, base):.1e}"


def unmoved(subject: Subject) -> PeftModel:
    """Return the model with a prefix that leaves real tokens at their positions."""
    try:
        return attach(build(subject.entry), prefix_init="random", offset_positions=False)
    except UnsupportedModelError:
        # Positions are relative here and move for no prefix.
        return attach(build(subject.entry), prefix_init="random")


@torch.no_grad()
def check_modality(subject: Subject) -> None:
    """With an image, audio or encoder states as well, the prefix acts, and hidden or off nothing is left of it."""
    arguments = real_inputs(subject.entry.name, subject.base, 2, LENGTH)
    if arguments.keys() == text_inputs(subject.entry.name, subject.base, 2, LENGTH).keys():
        raise NotApplicable("")
    base = subject.base.requires_grad_(False)(**arguments).logits
    found = subject.model(**arguments).logits
    assert found.shape == base.shape, f"shape {list(found.shape)}"
    assert difference(found, base) > 10 * TOLERANCE, "no effect"
    with subject.model.disable_adapter():
        assert torch.equal(subject.model(**arguments).logits, base), "differs when switched off"
    with hidden_prefix():
        hidden = unmoved(subject)(**arguments).logits
    assert same(hidden, base), f"hidden, it differs by {difference(hidden, base):.1e}"


@contextmanager
def hidden_prefix() -> Iterator[None]:
    """Hide the prefix in every mask that an attention module is given."""
    visible = Visibility.mask

    def hidden(made: Visibility, module: Any, arguments: dict[str, Any], length: int, extent: Extent) -> Any:
        mask = visible(made, module, arguments, length, extent)
        if isinstance(mask, dict):
            # Its entry for attention has been hidden by the call for that entry.
            return mask
        columns = length + (0 if made.block_size is None else -length % made.block_size)
        if mask is None:
            states = arguments[forward_parameters(module)[0]]
            shape = (states.shape[0], 1, extent.query_length, columns + _keys(made, arguments, extent))
            mask = states.new_zeros(shape)
        mask = mask.clone()
        mask[..., :columns] = _hiding(mask, made._hides_with_true)
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Visibility, "mask", hidden)
        yield


def _keys(made: Visibility, arguments: dict[str, Any], extent: Extent) -> int:
    """Return the number of real keys, which in cross-attention are an encoder's."""
    states = [arguments.get(name) for name in ENCODER_STATES_ARGUMENTS]
    cross = [state.shape[1] for state in states if state is not None]
    return cross[0] if made._cross_attention and cross else extent.key_length


def _hiding(mask: Tensor, hides_with_true: bool) -> float | bool:
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else hides_with_true


@torch.no_grad()
def check_saved(subject: Subject) -> None:
    """Saved and loaded, the logits are the same, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(build(subject.entry), folder).eval()
    found = subject.logits(loaded, subject.inputs)
    assert torch.equal(found, subject.prefixed), f"differs by {difference(found, subject.prefixed):.1e}"


@torch.no_grad()
def check_sdpa(subject: Subject) -> None:
    """SDPA gives the logits of eager attention."""
    _check_backend(subject, "sdpa")


@torch.no_grad()
def check_flex(subject: Subject) -> None:
    """FlexAttention gives the logits of eager attention."""
    # transformers compiles it, which takes the inductor most of a minute per model on a CPU.
    with torch.compiler.set_stance("force_eager"):
        _check_backend(subject, "flex_attention")


def _check_backend(subject: Subject, backend: str) -> None:
    try:
        base = subject.logits(build(subject.entry, backend), subject.inputs)
    except Exception as error:
        # Nearly always because the model does not offer it, which needs no words.
        raise NotApplicable("") from error
    if not same(base, subject.logits(subject.base, subject.inputs)):
        raise NotApplicable(f"the base model's {backend} differs from eager attention")
    model = attach(build(subject.entry, backend), prefix_init="random")
    found = subject.logits(model, subject.inputs)
    assert same(found, subject.prefixed), f"differs by {difference(found, subject.prefixed):.1e}"
    try:
        set_shared_attention(model, True)
    except UnsupportedModelError:
        return
    # The first call finds out which modules can share one copy of the prefix.
    for _ in range(2):
        found = subject.logits(model, subject.inputs)
    assert same(found, subject.prefixed), f"one shared copy differs by {difference(found, subject.prefixed):.1e}"


@torch.no_grad()
def generated(subject: Subject, model: torch.nn.Module, count: int = NEW_TOKENS, **options: Any) -> Tensor:
    """Return the `count` tokens that `generate` adds."""
    tokens = model.generate(
        input_ids=subject.inputs,
        attention_mask=torch.ones_like(subject.inputs),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        **options,
    )
    return tokens[:, -count:]


@torch.no_grad()
def spelled_out(subject: Subject, model: torch.nn.Module) -> Tensor:
    """Return what greedy search means: one whole forward pass per token."""
    tokens = subject.inputs
    config = subject.base.generation_config
    if subject.is_encoder_decoder:
        start = config.decoder_start_token_id
        tokens = torch.full((2, 1), config.bos_token_id if start is None else start)
    for _ in range(NEW_TOKENS):
        if subject.is_encoder_decoder:
            mask = torch.ones_like(subject.inputs)
            logits = subject.logits(model, subject.inputs, decoder_input_ids=tokens, attention_mask=mask)
        else:
            logits = subject.logits(model, tokens)
        logits = logits[:, -1].clone()
        ends = config.eos_token_id
        if ends is not None:
            logits[:, ends] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens[:, -NEW_TOKENS:]


def check_generate(subject: Subject) -> None:
    """`generate` gives what greedy search means: the best token of a whole forward pass, again and again."""
    if not subject.is_encoder_decoder:
        check_causal(subject)
    base = _base_can(lambda: generated(subject, subject.base), "in generate")
    if not torch.equal(base, spelled_out(subject, subject.base)):
        raise NotApplicable("the base model's generate differs from its forward pass")
    assert torch.equal(generated(subject, subject.model), spelled_out(subject, subject.model)), "other tokens"


def check_beams(subject: Subject) -> None:
    """Beam search gives the same with the cache and without."""
    # Longer, since a cache that beams leave in disorder need not show at once.
    if not _base_can(lambda: beams_agree(subject, subject.base, 3 * NEW_TOKENS), "in beam search"):
        raise NotApplicable("the base model's beams differ without a cache")
    assert beams_agree(subject, subject.model, NEW_TOKENS), "other tokens"


def beams_agree(subject: Subject, model: torch.nn.Module, count: int) -> Tensor:
    """Return whether beams find the same tokens with and without a cache."""
    cached = generated(subject, model, count, num_beams=3)
    return (cached == generated(subject, model, count, num_beams=3, use_cache=False)).all()


CHECKS: dict[str, Callable[[Subject], None]] = {
    "forward": check_forward,
    "off": check_off,
    "gradients": check_gradients,
    "projection": check_projection,
    "hidden": check_hidden,
    "moved": check_moved,
    "modality": check_modality,
    "rows": check_rows,
    "prompt": check_prompt,
    "scroll": check_scroll,
    "cache": check_cache,
    "padding": check_padding,
    "checkpointing": check_checkpointing,
    "saved": check_saved,
    "sdpa": check_sdpa,
    "flex": check_flex,
    "generate": check_generate,
    "beams": check_beams,
}


@dataclass(frozen=True)
class Result:
    """What was found of one entry.

    Args:
        roles: The attention that carries the prefix; none where the model is refused.
        outcomes: The outcome of each check; none where the model is refused.
        refusal: Why it is refused, or "".
    """

    roles: tuple[str, ...] = ()
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    refusal: str = ""


def examine(entry: Entry) -> Result:
    """Return the outcome of every check on an entry, or why it is refused."""
    try:
        subject = Subject(entry)
    except UnsupportedModelError as error:
        return Result(refusal=str(error))
    roles = tuple(getattr(subject.model.get_base_model(), CHILD_NAME))
    return Result(roles, {name: _outcome(check, subject) for name, check in CHECKS.items()})


def _outcome(check: Callable[[Subject], None], subject: Subject) -> Outcome:
    subject.model.eval()
    try:
        check(subject)
    except NotApplicable as reason:
        return Outcome("-", str(reason))
    except UnsupportedCallError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        return Outcome("NO", f"{type(error).__name__}: {error}".strip().splitlines()[0])
    return Outcome("yes")
