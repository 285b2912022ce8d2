"""Encoder-decoder models whose source is no text: the prefix acts in decoder and cross-attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_prefix import PrefixConfig
from matrix import assert_same

Built = tuple[PreTrainedModel, dict[str, Tensor]]

_TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
_STACKS = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    "d_model": 32,
    "max_target_positions": 64,
}


def whisper() -> Built:
    """Return Whisper and the spectrograms of two recordings."""
    config = transformers.WhisperConfig(**_TOKENS, **_STACKS, num_mel_bins=16, max_source_positions=32)
    return transformers.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 16, 64)}


def speech2text() -> Built:
    """Return Speech2Text and the filter banks of two recordings."""
    config = transformers.Speech2TextConfig(
        **_TOKENS, **_STACKS, input_feat_per_channel=16, conv_channels=16, max_source_positions=100
    )
    return transformers.Speech2TextForConditionalGeneration(config), {"input_features": torch.randn(2, 64, 16)}


def vision() -> Built:
    """Return a ViT encoder of another width with a GPT-2 decoder, and two images."""
    encoder = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=16
    )
    decoder = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 3, 0
    return transformers.VisionEncoderDecoderModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.fixture(params=[whisper, speech2text, vision], ids=lambda build: build.__name__)
def built(request: pytest.FixtureRequest) -> Callable[[], Built]:
    """Every model, always the same, its weights spread so that attention differs between positions."""

    def build() -> Built:
        torch.manual_seed(0)
        model, source = request.param()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=0.2)
        model.generation_config = transformers.GenerationConfig(pad_token_id=0, decoder_start_token_id=3)
        return model.eval(), source

    return build


def attach(model: PreTrainedModel, **options: Any) -> PeftModel:
    """Return the model with a prefix of random numbers."""
    config = PrefixConfig(num_virtual_tokens=4, prefix_init="random", roles=["decoder", "cross"], **options)
    return get_peft_model(model, config).eval()


def test_the_prefix_acts_learns_and_goes(built: Callable[[], Built]) -> None:
    model, source = built()
    words = torch.randint(5, 99, (2, 6))
    wanted = model.requires_grad_(False)(**source, decoder_input_ids=words).logits
    prefixed = attach(model)
    found = prefixed(**source, decoder_input_ids=words).logits
    assert (found - wanted).abs().max() > 0.1
    (found * torch.linspace(-1, 1, found.shape[-1])).sum().backward()
    gradients = [parameter.grad for parameter in prefixed.parameters() if parameter.requires_grad]
    assert len(gradients) == 8
    assert all(gradient is not None and bool((gradient != 0).any()) for gradient in gradients)
    with prefixed.disable_adapter():
        assert torch.equal(prefixed(**source, decoder_input_ids=words).logits, wanted)


@torch.no_grad()
def test_generate_gives_the_logits_of_whole_forward_passes(built: Callable[[], Built]) -> None:
    model, source = built()
    prefixed = attach(model)
    result = prefixed.generate(
        **source, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = prefixed(**source, decoder_input_ids=result.sequences[:, :-1], use_cache=False).logits
    assert_same(torch.stack(result.logits, dim=1), whole[:, -len(result.logits) :])


def test_an_encoder_without_a_prefix_is_spoken_of(built: Callable[[], Built]) -> None:
    model, _ = built()
    with pytest.warns(UserWarning, match=r"The encoder of .* carries no prefix.*roles=\['decoder', 'cross'\]"):
        get_peft_model(model, PrefixConfig(num_virtual_tokens=4))
