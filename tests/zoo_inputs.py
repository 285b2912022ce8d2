"""Inputs of the tiny models: text, and what else a model of several modalities really gets.

The audio and images are random numbers in the form that the family's processor gives them. Where a model puts their
embeddings in the place of tokens, `input_ids` has as many placeholders per row as its tower gives states; the models
themselves refuse any other number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo import START, words

DECODER_LENGTH = 7
NEEDS_MORE_THAN_TEXT = {
    "seq2seq-voxtral_realtime": "every token is added to a state of the audio, which must be as long as the text",
}
"""Entries whose forward raises when it is given text alone, and why."""


@dataclass(frozen=True)
class Extra:
    """What a model gets besides its text.

    Args:
        arguments: Further arguments of its forward.
        placeholders: How many tokens of each row stand for audio or an image.
        token: Id of a placeholder.
    """

    arguments: dict[str, Any]
    placeholders: int = 0
    token: int = 0


@dataclass(frozen=True)
class Request:
    """For which inputs something is made.

    Args:
        model: The tiny model.
        rows: How many rows.
        length: Tokens per row.
        generator: Source of the random numbers.
        new_tokens: How many tokens will be generated.
    """

    model: PreTrainedModel
    rows: int
    length: int
    generator: torch.Generator
    new_tokens: int = 0

    @property
    def config(self) -> Any:
        return self.model.config

    def numbers(self, *shape: int) -> Tensor:
        """Return random numbers [rows, *shape]."""
        return torch.randn(self.rows, *shape, generator=self.generator)

    def ones(self, *shape: int) -> Tensor:
        """Return a mask [rows, *shape] that hides nothing."""
        return torch.ones(self.rows, *shape, dtype=torch.long)


def text_inputs(
    entry_name: str, model: PreTrainedModel, rows: int, length: int, seed: int = 1, new_tokens: int = 0
) -> dict[str, Any]:
    """Return the least that a model's forward accepts: text, for nearly all.

    Args:
        entry_name: Name of the model's entry.
        model: The model.
        rows: How many rows.
        length: Tokens per row.
        seed: Of the random numbers.
        new_tokens: As for `inputs`.

    Returns:
        The arguments: `input_ids` [rows, length], and for an encoder-decoder `decoder_input_ids` [rows, 7]. A model
        that decodes several codebooks at once has `input_ids` [rows * codebooks, length] and a mask.
    """
    if entry_name in NEEDS_MORE_THAN_TEXT:
        return inputs(entry_name, model, rows, length, seed, new_tokens)
    return _text(entry_name, model, rows, length, seed)


def inputs(
    entry_name: str, model: PreTrainedModel, rows: int, length: int, seed: int = 1, new_tokens: int = 0
) -> dict[str, Any]:
    """Return text together with the audio, image or encoder states that the model is made for.

    Args:
        entry_name: Name of the model's entry.
        model: The model.
        rows: How many rows.
        length: Tokens per row, placeholders among them; at least 8.
        seed: Of the random numbers.
        new_tokens: For `generate`: how many tokens it will add. A model that hears one piece of the audio with every
            token needs as much audio; its forward takes exactly as much as there is text, so 0 there.

    Returns:
        The arguments as `text_inputs` gives them, and those of the other modality. They are text alone where the
        entry has no other modality.
    """
    request = Request(model, rows, length, torch.Generator().manual_seed(seed), new_tokens)
    arguments = _text(entry_name, model, rows, length, seed)
    make = _EXTRAS.get(entry_name.partition("-")[2])
    if make is None:
        return arguments
    extra = make(request)
    # Behind the first word, so that placeholders are not at the edge.
    arguments["input_ids"][:, 1 : 1 + extra.placeholders] = extra.token
    return arguments | extra.arguments


def _text(entry_name: str, model: PreTrainedModel, rows: int, length: int, seed: int) -> dict[str, Any]:
    if entry_name.startswith("causal-musicgen"):
        # generate would take a mask of its own from the rows of all codebooks, which the model then refuses.
        mask = torch.ones(rows, length, dtype=torch.long)
        return {"input_ids": words(rows * model.config.num_codebooks, length, seed=seed), "attention_mask": mask}
    arguments = {"input_ids": words(rows, length, seed=seed)}
    if model.config.is_encoder_decoder:
        decoder = words(rows, DECODER_LENGTH, seed=seed + 1)
        decoder[:, 0] = START
        arguments["decoder_input_ids"] = decoder
    return arguments


def _token(config: Any, modality: str) -> int:
    """Return the id of the placeholder of "audio" or "image"."""
    names = (f"{modality}_token_id", f"{modality}_token_index")
    return int(next(getattr(config, name) for name in names if hasattr(config, name)))


def _whisper_like(states: int) -> Callable[[Request], Extra]:
    """Return the maker for towers that halve the frames, of a fixed number, with a convolution.

    Args:
        states: What the model makes of one audio.
    """

    def make(request: Request) -> Extra:
        audio = request.config.audio_config
        frames = 2 * audio.max_source_positions
        features = request.numbers(audio.num_mel_bins, frames)
        mask = "feature_attention_mask" if request.config.model_type == "qwen2_audio" else "input_features_mask"
        arguments = {"input_features": features}
        if request.config.model_type != "voxtral":
            arguments[mask] = request.ones(frames)
        return Extra(arguments, states, _token(request.config, "audio"))

    return make


def _glm_asr(request: Request) -> Extra:
    features = request.numbers(request.config.audio_config.num_mel_bins, 32)
    arguments = {"input_features": features, "input_features_mask": request.ones(32)}
    return Extra(arguments, 4, _token(request.config, "audio"))


def _omniasr(request: Request) -> Extra:
    # Convolutions of stride 4 and 2.
    return Extra({"input_values": request.numbers(1, 32)}, 4, _token(request.config, "audio"))


def _granite_speech(request: Request) -> Extra:
    config = request.config
    frames = 2 * config.window_size
    features = request.numbers(frames, config.encoder_config.input_dim)
    return Extra({"input_features": features}, frames // config.downsample_rate, _token(config, "audio"))


def _nemo(request: Request) -> Extra:
    audio = request.config.audio_config
    frames = 4 * audio.subsampling_factor
    features = request.numbers(frames, audio.asr_config.num_mel_bins)
    arguments = {"input_features": features, "input_features_mask": request.ones(frames)}
    return Extra(arguments, 4, _token(request.config, "audio"))


def _qwen3_asr(request: Request) -> Extra:
    audio = request.config.audio_config
    frames, heard = 2 * audio.n_window, 32
    mask = request.ones(frames)
    mask[:, heard:] = 0
    arguments = {"input_features": request.numbers(audio.num_mel_bins, frames), "input_features_mask": mask}
    return Extra(arguments, heard // 8, _token(request.config, "audio"))


def _vibevoice(request: Request) -> Extra:
    samples = 4 * request.config.acoustic_tokenizer_encoder_config.hop_length
    # The model adds noise to the latent states unless told otherwise.
    arguments = {"input_values": request.numbers(1, samples), "sample": False}
    return Extra(arguments, 4, _token(request.config, "audio"))


def _voxtral_realtime(request: Request) -> Extra:
    config = request.config
    frames = config.audio_length_per_tok * (request.length + request.new_tokens)
    return Extra({"input_features": request.numbers(config.audio_config.num_mel_bins, frames), "num_delay_tokens": 1})


def _image(request: Request, size: int) -> Tensor:
    return request.numbers(3, size, size)


def _fixed_image(request: Request) -> Extra:
    """Make an image that becomes `mm_tokens_per_image` states."""
    config = request.config
    own = config.encoder if request.config.is_encoder_decoder else config
    pixels = _image(request, own.vision_config.image_size)
    return Extra({"pixel_values": pixels}, own.mm_tokens_per_image, _token(config, "image"))


def _gemma3(request: Request) -> Extra:
    extra = _fixed_image(request)
    kinds = torch.zeros(request.rows, request.length, dtype=torch.long)
    kinds[:, 1 : 1 + extra.placeholders] = 1
    return Extra(extra.arguments | {"token_type_ids": kinds}, extra.placeholders, extra.token)


def _got_ocr2(request: Request) -> Extra:
    vision = request.config.vision_config
    # The projector's two convolutions halve each side of the grid of patches.
    states = (-(-vision.image_size // vision.patch_size // 4)) ** 2
    return Extra({"pixel_values": _image(request, vision.image_size)}, states, _token(request.config, "image"))


def _fuyu(request: Request) -> Extra:
    config = request.config
    patches = request.numbers(4, config.num_channels * config.patch_size**2)
    return Extra({"pixel_values": patches}, 4, _token(config, "image"))


def _gemma4(request: Request) -> Extra:
    """Make the patches of an image; squares of them, of the size of the pooling kernel, become one state each."""
    vision = request.config.vision_config
    side = 2 * vision.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(request.rows, -1, -1)
    kinds = torch.zeros(request.rows, request.length, dtype=torch.long)
    kinds[:, 1:5] = 1
    arguments = {
        "pixel_values": request.numbers(side**2, 3 * vision.patch_size**2).sigmoid(),
        "image_position_ids": places,
        "mm_token_type_ids": kinds,
    }
    return Extra(arguments, 4, _token(request.config, "image"))


def _gemma4_unified(request: Request) -> Extra:
    """Make the patches of an image, already merged by the family's processor; each becomes one state."""
    vision = request.config.vision_config
    side = vision.patch_size * vision.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2)).expand(request.rows, -1, -1)
    kinds = torch.zeros(request.rows, request.length, dtype=torch.long)
    kinds[:, 1:5] = 1
    arguments = {
        "pixel_values": request.numbers(4, 3 * side**2).sigmoid(),
        "image_position_ids": places,
        "mm_token_type_ids": kinds,
    }
    return Extra(arguments, 4, _token(request.config, "image"))


def _git(request: Request) -> Extra:
    # No placeholders: the model puts the image's states in front of the text, and gives logits for them too.
    return Extra({"pixel_values": _image(request, request.config.vision_config.image_size)})


def _mllama(request: Request) -> Extra:
    return Extra({"cross_attention_states": request.numbers(6, request.config.get_text_config().hidden_size)})


def _phi4(request: Request) -> Extra:
    audio = request.config.audio_config
    features = request.numbers(4 * audio.time_reduction, audio.input_size)
    sizes = torch.full((request.rows,), 4)
    arguments = {"audio_input_features": features, "audio_embed_sizes": sizes}
    return Extra(arguments, 4, audio.audio_token_id)


def _encoder_states(request: Request) -> Extra:
    """Make what the decoder of a larger model gets from its encoder."""
    return Extra({"encoder_hidden_states": request.numbers(6, request.config.hidden_size)})


def _whisper_encoder_states(request: Request) -> Extra:
    return Extra({"encoder_outputs": (request.numbers(6, request.config.d_model),)})


_EXTRAS: dict[str, Callable[[Request], Extra]] = {
    "audioflamingo3": _whisper_like(4),
    "fuyu": _fuyu,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
    "git": _git,
    "glmasr": _glm_asr,
    "got_ocr2": _got_ocr2,
    "granite_speech": _granite_speech,
    "granite_speech_plus": _granite_speech,
    "mllama": _mllama,
    "moss_transcribe_diarize": _whisper_like(4),
    "musicflamingo": _whisper_like(4),
    "musicgen": _encoder_states,
    "musicgen_melody": _encoder_states,
    "nemo_speechlm": _nemo,
    "omniasr": _omniasr,
    "phi4_multimodal": _phi4,
    "qwen2_audio": _whisper_like(4),
    "qwen3_asr": _qwen3_asr,
    "t5gemma2": _fixed_image,
    "trocr": _encoder_states,
    "vibevoice_asr": _vibevoice,
    "voxtral": _whisper_like(4),
    "voxtral_realtime": _voxtral_realtime,
    "whisper": _whisper_encoder_states,
}
