"""Records what adapters 1.3.0 (with transformers 4.57.6) saves and computes, for tests/test_interop_formats.py.

It needs these releases, which do not go together with those of this project:
`pip install adapters==1.3.0 transformers==4.57.6`, then `python record.py`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import adapters
from adapters import PrefixTuningConfig

HERE = Path(__file__).parent
TOKENS = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
SEQ2SEQ = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4, "intermediate_size": 8}


def models() -> dict[str, tuple[PreTrainedModel, PrefixTuningConfig]]:
    """Return models of two layers, each with a configuration of another kind."""
    gpt2 = GPT2Config(**TOKENS, n_embd=8, n_layer=2, n_head=2, n_positions=32)
    mistral = MistralConfig(**TOKENS, **GROUPED, hidden_size=8, num_hidden_layers=2, max_position_embeddings=32)
    layers = {"encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32, "decoder_start_token_id": 3}
    bart = BartConfig(**TOKENS, **SEQ2SEQ, **layers, d_model=8)
    options = {"prefix_length": 3, "bottleneck_size": 4}
    return {
        "gpt2": (GPT2LMHeadModel(gpt2), PrefixTuningConfig(**options)),
        "mistral": (MistralForCausalLM(mistral), PrefixTuningConfig(**options, flat=True)),
        "bart": (BartForConditionalGeneration(bart), PrefixTuningConfig(**options, leave_out=[0, 3])),
    }


def main() -> None:
    """Write for each model a folder: the base model, the adapter, and inputs with the logits of both."""
    torch.manual_seed(0)
    for name, (model, config) in models().items():
        spread(model)
        model.save_pretrained(HERE / name / "base")
        inputs = {"input_ids": torch.randint(5, 24, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
        if model.config.is_encoder_decoder:
            inputs["attention_mask"][0, -3:] = 0
            inputs["decoder_input_ids"] = torch.randint(5, 24, (2, 6))
        with torch.no_grad():
            base_logits = model.eval()(**inputs).logits
            adapters.init(model)
            model.add_adapter("task", config=config)
            spread(model, only="control_trans")
            model.set_active_adapters("task")
            logits = model.eval()(**inputs).logits
        save_adapter(model, HERE / name / "adapter")
        save_file(inputs | {"base_logits": base_logits, "logits": logits}, HERE / name / "computed.safetensors")


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Save the adapter, and its pickle file as safetensors, which adapters 1.3.0 cannot write for prefixes."""
    model.save_adapter(str(folder), "task", with_head=False)
    pickled = folder / "pytorch_adapter.bin"
    tensors = torch.load(pickled, weights_only=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    pickled.unlink()


def spread(model: PreTrainedModel, only: str = "") -> None:
    """Give weights numbers that make attention differ between positions."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name and parameter.dim() >= 2:
                parameter.normal_(std=0.5)


if __name__ == "__main__":
    main()
