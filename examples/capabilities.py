"""What works here and in PEFT's prefix tuning: each check runs on tiny models, for both, and fills a table.

    python examples/capabilities.py

Every model is built from a configuration in memory, with random weights (seed 0), so nothing is downloaded. A check
passes when the numbers agree with the base model given the real thing, to 1e-4 in float32; otherwise the table says
"wrong" (it ran and the numbers differ) or names the error.
"""

import contextlib
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import hf_prefix
from hf_prefix import PrefixConfig

VOCABULARY, PAD, LENGTH = 97, 0, 4
TOLERANCE = 1e-4
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# transformers 5.24 renamed the argument and the field of the output.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Method:
    """One of the two implementations.

    Args:
        name: Column of the table.
        config: Makes its configuration from a task type and whether to use the projection.
    """

    name: str
    config: Callable[[str, bool], PeftConfig]

    def attach(self, model: PreTrainedModel, projection: bool = False) -> PeftModel:
        """Return the model with a prefix of LENGTH tokens, the same random numbers each time."""
        torch.manual_seed(1)
        task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        return get_peft_model(model, self.config(task, projection)).eval()


def ours(task_type: str, projection: bool) -> PrefixConfig:
    """Return our configuration, started at random numbers like PEFT's."""
    return PrefixConfig(
        task_type=task_type,
        num_virtual_tokens=LENGTH,
        prefix_init="random",
        prefix_projection=projection,
        encoder_hidden_size=16 if projection else None,
    )


def theirs(task_type: str, projection: bool) -> PrefixTuningConfig:
    """Return PEFT's configuration."""
    size = 16 if projection else None
    return PrefixTuningConfig(
        task_type=task_type, num_virtual_tokens=LENGTH, prefix_projection=projection, encoder_hidden_size=size
    )


METHODS = [Method(f"PEFT {peft.__version__}", theirs), Method(f"hf_prefix {hf_prefix.__version__}", ours)]


def llama() -> PreTrainedModel:
    """Return a Llama with grouped-query attention."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER)).eval()


def gemma() -> PreTrainedModel:
    """Return a Gemma 3 of one layer with a window of 8."""
    torch.manual_seed(0)
    sizes = DECODER | {"num_hidden_layers": 1}
    config = Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8, layer_types=["sliding_attention"])
    return Gemma3ForCausalLM(config).eval()


def bart() -> PreTrainedModel:
    """Return a BART."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**SPECIAL, d_model=32, **sizes, **heads, decoder_start_token_id=2, forced_eos_token_id=None)
    return BartForConditionalGeneration(config).eval()


def t5() -> PreTrainedModel:
    """Return a T5 whose heads are wider together than the model."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=12, num_layers=2, num_heads=4, d_ff=64, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def words(rows: int, length: int) -> Tensor:
    """Return random token ids, the same each time."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def close(left: Tensor, right: Tensor) -> bool:
    """Whether two results agree."""
    return left.shape == right.shape and bool(torch.allclose(left, right, atol=TOLERANCE))


def greedy(model: PeftModel, **kwargs: object) -> Tensor:
    """Return 8 greedily decoded tokens."""
    output = model.generate(**kwargs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return output[:, -8:]


def gradients(model: PeftModel, **inputs: Tensor) -> dict[str, Tensor | None]:
    """Return the gradient of each trainable parameter."""
    model.train()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def every_parameter_learns(method: Method) -> bool:
    """BART: encoder, decoder and cross-attention, each trainable number has a gradient."""
    found = gradients(method.attach(bart()), input_ids=words(2, 7), labels=words(2, 6))
    return all(grad is not None and bool((grad != 0).all()) for grad in found.values())


def gradient_checkpointing(method: Method) -> bool:
    """Same gradients with checkpointing as without."""
    inputs = {"input_ids": words(2, 7), "labels": words(2, 7)}
    wanted = gradients(method.attach(llama()), **inputs)
    model = method.attach(llama())
    model.enable_input_require_grads()
    base = model.get_base_model()
    # transformers 5.23 renamed it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    found = gradients(model, **inputs)
    return all(close(found[name], wanted[name]) for name in wanted)


def no_cache(method: Method) -> bool:
    """Decoding without a cache gives the same tokens."""
    model = method.attach(llama())
    return torch.equal(greedy(model, input_ids=words(2, 7)), greedy(model, input_ids=words(2, 7), use_cache=False))


def static_cache(method: Method) -> bool:
    """Decoding with a static cache gives the same tokens."""
    model, wanted = method.attach(llama()), greedy(method.attach(llama()), input_ids=words(2, 7))
    return torch.equal(greedy(model, input_ids=words(2, 7), cache_implementation="static"), wanted)


def users_cache(method: Method) -> bool:
    """A cache that the user passes is the one that is filled, and the prefix is still seen."""
    model, tokens = method.attach(llama()), words(1, 7)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        found = model(input_ids=tokens, **{CACHE: cache}).logits
    return int(cache.get_seq_length()) == 7 and close(found, wanted)


def second_turn(method: Method) -> bool:
    """Going on with a returned cache equals one longer input."""
    model, tokens = method.attach(llama()), words(1, 10)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits[:, 7:]
        cache = getattr(model(input_ids=tokens[:, :7], use_cache=True), CACHE)
        return close(model(input_ids=tokens[:, 7:], **{CACHE: cache}).logits, whole)


def left_padding(method: Method) -> bool:
    """A left-padded row gives the logits of the row alone."""
    model, tokens = method.attach(llama()), words(1, 7)
    padded = torch.cat([torch.full((1, 3), PAD), tokens], dim=1)
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=(padded != PAD).long()).logits[:, 3:]
        return close(found, model(input_ids=tokens).logits)


def sliding_window(method: Method) -> bool:
    """Beyond the window of a sliding layer the prefix is still seen: the last token's loss reaches it."""
    tokens = words(1, 24)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    found = gradients(method.attach(gemma()), input_ids=tokens, labels=labels)
    return any(grad is not None and bool((grad != 0).any()) for grad in found.values())


def odd_heads(method: Method) -> bool:
    """T5 whose heads are together wider than the model."""
    model = method.attach(t5())
    with torch.no_grad():
        return bool(model(input_ids=words(2, 7), labels=words(2, 6)).loss.isfinite())


def resume_with_projection(method: Method) -> bool:
    """Training that is interrupted and resumed ends with the weights of an unbroken run, with the MLP."""
    rows = [{"input_ids": row, "labels": row} for row in words(8, 7)]

    def train(model: PeftModel, folder: str, **kwargs: object) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=4, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
        )
        Trainer(model, arguments, train_dataset=rows).train(**kwargs)
        return {name: value for name, value in model.named_parameters() if value.requires_grad}

    with tempfile.TemporaryDirectory() as folder:
        wanted = train(method.attach(llama(), projection=True), folder)
        resumed = method.attach(llama(), projection=True)
        found = train(resumed, folder, resume_from_checkpoint=f"{folder}/checkpoint-2")
    return bool(wanted) and all(torch.equal(found[name], value) for name, value in wanted.items())


def transformers_adapter(method: Method) -> bool:
    """The model takes it through add_adapter, which is part of transformers."""
    model = llama()
    model.add_adapter(method.config("CAUSAL_LM", False))
    return any("prefix" in name for name, _ in model.named_parameters())


def prefix_per_row(method: Method) -> bool:
    """Rows of one batch have a prefix or none, as adapter_names says."""
    model, tokens = method.attach(llama()), words(2, 7)
    with torch.no_grad():
        together = model(input_ids=tokens).logits
        with model.disable_adapter():
            base = model(input_ids=tokens).logits
        mixed = model(input_ids=tokens, adapter_names=["__base__", "default"]).logits
    return close(mixed[0], base[0]) and close(mixed[1], together[1])


CHECKS = {
    "encoder, decoder and cross-attention of BART all learn": every_parameter_learns,
    "gradient checkpointing gives the same gradients": gradient_checkpointing,
    "resumed training = unbroken training, with the MLP": resume_with_projection,
    "generate without a cache = with one": no_cache,
    "generate with a static cache": static_cache,
    "a cache passed by the user is used": users_cache,
    "a second turn on the returned cache": second_turn,
    "left padding changes nothing in forward": left_padding,
    "sliding windows keep the prefix": sliding_window,
    "T5 with d_kv x heads != d_model": odd_heads,
    "a prefix for each row (`adapter_names`)": prefix_per_row,
    "`model.add_adapter` of transformers": transformers_adapter,
}


def outcome(check: Callable[[Method], bool], method: Method) -> str:
    """Run one check and return its cell of the table."""
    try:
        return "yes" if check(method) else "wrong"
    except Exception as error:  # whatever a method raises is its result here
        return f"no ({type(error).__name__})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings out of the table."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Run all checks and print the table as Markdown."""
    rows = []
    for title, check in CHECKS.items():
        with quiet():
            rows.append([title, *(outcome(check, method) for method in METHODS)])
    print("| | " + " | ".join(method.name for method in METHODS) + " |")
    print("|---" * (len(METHODS) + 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
