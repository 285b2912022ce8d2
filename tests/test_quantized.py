"""Base models whose weights are quantised: a prefix attaches, trains, generates and loads as on any other.

Each library is tested where it is installed; the extra `test` brings those that work on a CPU.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from families import PAD, START, VOCABULARY, tokens
from hf_prefix import PrefixConfig
from matrix import assert_same
from upstream import checkpoint_activations

TEXT = [7, 8, 9, 10, 11]
"""The tokens that the prefixes start from."""

WIDTH = 64
"""Of the models; the 4-bit formats put this many numbers into a block."""

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}

Load = Callable[..., PreTrainedModel]


def _llama() -> PreTrainedModel:
    config = LlamaConfig(
        **_TOKENS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        eos_token_id=2,
        d_model=WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=2 * WIDTH,
        num_layers=2,
        dropout_rate=0.0,
        decoder_start_token_id=START,
    )
    return T5ForConditionalGeneration(config)


def _library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed; the extra 'test' brings it")


def _bitsandbytes(**options: Any) -> Any:
    _library("bitsandbytes")
    return transformers.BitsAndBytesConfig(**options)


def _torchao(name: str, **options: Any) -> Any:
    quantization = _library("torchao.quantization")
    return transformers.TorchAoConfig(getattr(quantization, name)(**options))


def _torchao_int4() -> Any:
    per_group = _library("torchao.quantization").PerGroup(32)
    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=per_group)


def _quanto(weights: str) -> Any:
    _library("optimum.quanto")
    return transformers.QuantoConfig(weights=weights)


FORMATS: dict[str, Callable[[], Any]] = {
    # Without outliers, which are looked for in all tokens of a batch at once: there, the base model itself gives other
    # logits for a row alone.
    "bitsandbytes-int8": lambda: _bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
    "bitsandbytes-nf4": lambda: _bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "bitsandbytes-fp4-double": lambda: _bitsandbytes(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao-int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao-int4": _torchao_int4,
    "quanto-int8": lambda: _quanto("int8"),
    "quanto-int4": lambda: _quanto("int4"),
}

pytestmark = [
    # bitsandbytes says so at each call: its 8-bit product has no other type.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    # PEFT 0.21.2 calls by its old name what transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


def _saved(build: Callable[[], PreTrainedModel], folder: Path) -> Path:
    """Save a model whose weights spread wide enough that attention differs between positions."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


def _write_gguf(model: PreTrainedModel, file: Path) -> None:
    """Write a Llama as llama.cpp does: matrices in blocks of 8-bit numbers, the rest in float32."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantised(name: str, build: Callable[[], PreTrainedModel], folder: Path) -> Load:
    """Return a function that loads a new quantised base model, always with the same weights."""
    kind = type(build())
    load = partial(kind.from_pretrained, _saved(build, folder), dtype=torch.float32)
    if name != "gguf":
        return partial(load, quantization_config=FORMATS[name]())
    _write_gguf(load(), folder / "tiny.gguf")
    return partial(load, gguf_file="tiny.gguf")


CASES = {f"{name}-{build.__name__[1:]}": (name, build) for name in FORMATS for build in (_llama, _t5)}
CAUSAL = {"gguf-llama": ("gguf", _llama)} | {name: case for name, case in CASES.items() if case[1] is _llama}


@pytest.fixture(params=CASES | CAUSAL)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    """Loads a new quantised base model."""
    return _quantised(*(CASES | CAUSAL)[request.param], tmp_path / "base")


@pytest.fixture(params=CAUSAL)
def load_causal(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    """Loads a new quantised decoder-only base model."""
    return _quantised(*CAUSAL[request.param], tmp_path / "base")


def _attach(base: PreTrainedModel, **options: Any) -> PeftModel:
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    start = {"prefix_init": "token_ids", "prefix_init_token_ids": TEXT}
    if options.get("prefix_projection"):
        options["encoder_hidden_size"] = 16
    return get_peft_model(base, PrefixConfig(task_type=task, **(start | options)))


def _batch(model: nn.Module) -> dict[str, Tensor]:
    words = tokens(2, 12)
    if not model.config.is_encoder_decoder:
        return {"input_ids": words, "labels": words}
    return {"input_ids": words, "labels": tokens(2, 7, seed=3)}


def _copy(base: nn.Module) -> dict[str, Tensor]:
    """Return what the base model's weights are, by name."""
    weights = {name: tensor for name, tensor in base.state_dict().items() if isinstance(tensor, Tensor)}
    return {name: _plain(tensor).clone() for name, tensor in weights.items() if "hf_prefix" not in name}


def _plain(tensor: Tensor) -> Tensor:
    # Tensors of torchao do not compare.
    return tensor.dequantize() if type(tensor).__module__.startswith("torchao") else tensor.detach()


def _losses(model: nn.Module, steps: int = 6, rate: float = 3e-3) -> list[float]:
    """Train on one batch and return the loss before each step."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**_batch(model)).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


# --- Any quantised model -------------------------------------------------------------------------------------


def test_training_changes_the_prefix_alone(load: Load, projection: bool) -> None:
    base = load()
    before = _copy(base)
    model = _attach(base, prefix_projection=projection).train()
    model(**_batch(model)).loss.backward()
    assert all(("hf_prefix" in name) == (p.grad is not None) for name, p in model.named_parameters())
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    losses = _losses(model)
    assert losses[-1] < losses[0]
    after = _copy(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@torch.no_grad()
def test_a_prefix_of_real_tokens_is_the_prompt(load_causal: Load, projection: bool) -> None:
    base, model = load_causal(), _attach(load_causal(), prefix_projection=projection)
    # On some CPUs the 4-bit layers of bitsandbytes compute in bfloat16 in evaluation mode. Nothing drops out here.
    training = getattr(base, "is_loaded_in_4bit", False)
    words, prompt = tokens(2, 12), torch.tensor([TEXT] * 2)
    wanted = base.train(training)(input_ids=torch.cat([prompt, words], dim=1)).logits[:, len(TEXT) :]
    assert_same(model.train(training)(input_ids=words).logits, wanted)


@torch.no_grad()
def test_off_is_base(load: Load) -> None:
    model, base = _attach(load()).eval(), load().eval()
    batch = _batch(base)
    wanted = base(**batch).logits
    assert not torch.equal(model(**batch).logits, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, wanted)


def test_generate_is_the_same_with_and_without_a_cache(load: Load, projection: bool) -> None:
    model = _attach(load(), prefix_projection=projection).eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    words = model.generate(input_ids=tokens(2, 12), **options)
    assert torch.equal(words, model.generate(input_ids=tokens(2, 12), use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "meta"])
def test_saved_is_the_same(load: Load, projection: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = _attach(load(), prefix_projection=projection).eval()
    model.save_pretrained(tmp_path / "prefix")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "prefix", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    batch = _batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_quantised_and_not_it_is_the_same_base(load: Load, tmp_path: Path) -> None:
    if "gguf_file" in load.keywords and not hasattr(transformers, "GgufConfig"):
        pytest.skip(f"transformers {transformers.__version__} leaves no sign that weights were read from a GGUF file")
    start = {"prefix_init": "zero", "prefix_init_token_ids": None, "num_virtual_tokens": 2}
    plain = partial(load.func, *load.args, dtype=torch.float32)
    for name, here, there in (("plain", load, plain), ("quantised", plain, load)):
        _attach(there(), **start).save_pretrained(tmp_path / name)
        PeftModel.from_pretrained(here(), tmp_path / name)


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_a_model_prepared_for_training_with_checkpointing_learns_the_same(load: Load, reentrant: bool) -> None:
    options = {"use_reentrant": reentrant}
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=options)
    if not _checkpoints(base):
        # PEFT 0.21.2 switches it on for the kinds that it knows; quanto and GGUF are not among them.
        checkpoint_activations(base, options)
        base.enable_input_require_grads()
    assert _checkpoints(base)
    losses = _losses(_attach(base).train(), steps=3)
    assert losses == pytest.approx(_losses(_attach(load()).train(), steps=3), abs=1e-5)
    assert losses[-1] < losses[0]


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_prefixes_are_float32_and_in_memory(load: Load, projection: bool) -> None:
    model = _attach(load(), prefix_projection=projection)
    prefix = [parameter for name, parameter in model.named_parameters() if "hf_prefix" in name]
    assert {(parameter.dtype, parameter.device.type) for parameter in prefix} == {(torch.float32, "cpu")}


def test_trainer_trains_a_prefix_on_a_4_bit_model(tmp_path: Path) -> None:
    load = _quantised("bitsandbytes-nf4", _llama, tmp_path / "base")
    model = _attach(load())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "hf_prefix" in name}
    words = tokens(4, 12).tolist()
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in words]
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    after = dict(model.named_parameters())
    assert before
    assert not any(torch.equal(parameter, after[name]) for name, parameter in before.items())
