"""What the field names do not say, for the mapping of sequence-to-sequence models: per entry, small values."""

from typing import Any

_QWEN2: dict[str, Any] = {"model_type": "qwen2"}
_QWEN3: dict[str, Any] = {"model_type": "qwen3"}
_LLAMA: dict[str, Any] = {"model_type": "llama"}
_AUDIO_FLAMINGO: dict[str, Any] = {
    "audio_config": {"model_type": "audioflamingo3_encoder", "max_source_positions": 8},
    "text_config": _QWEN2,
}
# These projectors read four states of the tower at once, as one of the size of its feed-forward layer.
_FOUR_STATES = 4 * 32
_GRANITE: dict[str, Any] = {
    "text_config": {"model_type": "granite"},
    "encoder_config": {"input_dim": 16, "context_size": 8, "max_pos_emb": 8, "conv_kernel_size": 3},
    "projector_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": 32},
    "window_size": 4,
    "downsample_rate": 2,
}
_SAMPLES_TO_FRAMES: dict[str, Any] = {
    "model_type": "vibevoice_acoustic_tokenizer_encoder",
    "hidden_size": 8,
    "num_filters": 4,
    "kernel_size": 3,
    "downsampling_ratios": (2, 2),
    "depths": (1, 1, 1),
}
# The T5 family: a decoder of another depth than the encoder's, and heads that together are narrower than the model.
# The decoder is the shallower one: transformers 5.23 sizes its cache by the encoder's depth.
_T5: dict[str, Any] = {"num_layers": 3, "num_decoder_layers": 2, "d_kv": 6}
_UNEQUAL_DEPTHS: dict[str, Any] = {"encoder_layers": 3, "decoder_layers": 2}
_LONG_T5: dict[str, Any] = _T5 | {"local_radius": 3, "global_block_size": 4}
_BIG_BIRD: dict[str, Any] = _UNEQUAL_DEPTHS | {"block_size": 2, "num_random_blocks": 1}
_SLIDING_AND_FULL: dict[str, Any] = {
    "head_dim": 12,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
}

SEQ2SEQ_VARIANTS: dict[str, tuple[str, ...]] = {
    "seq2seq-bigbird_pegasus": ("full",),
    "seq2seq-longt5": ("local",),
    "seq2seq-prophetnet": ("one-head",),
}
"""Entries whose configuration chooses between kinds of attention: names of the choices that are built besides."""

SEQ2SEQ_OVERRIDES: dict[str, dict[str, Any]] = {
    "seq2seq-audioflamingo3": _AUDIO_FLAMINGO,
    "seq2seq-bart": _UNEQUAL_DEPTHS,
    # As for the causal model.
    "seq2seq-prophetnet-one-head": {"ngram": 1, "num_decoder_attention_heads": 1},
    # Small blocks: rows of more than 7 of them take the sparse path.
    "seq2seq-bigbird_pegasus": _BIG_BIRD,
    "seq2seq-bigbird_pegasus-full": _BIG_BIRD | {"attention_type": "original_full"},
    "seq2seq-encoder-decoder": {
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        "pad_token_id": 0,
        "decoder_start_token_id": 3,
    },
    "seq2seq-glmasr": {
        "audio_config": {"model_type": "glmasr_encoder", "intermediate_size": _FOUR_STATES},
        "text_config": _LLAMA,
    },
    "seq2seq-granite_speech": _GRANITE,
    "seq2seq-granite_speech_plus": _GRANITE
    | {
        "encoder_config": _GRANITE["encoder_config"] | {"cat_hidden_layers": [1]},
        "projector_config": _GRANITE["projector_config"] | {"encoder_hidden_size": 64},
    },
    "seq2seq-led": {"attention_window": 8},
    "seq2seq-m2m_100": _UNEQUAL_DEPTHS,
    "seq2seq-longt5": _LONG_T5 | {"encoder_attention_type": "transient-global"},
    "seq2seq-longt5-local": _LONG_T5 | {"encoder_attention_type": "local"},
    "moss_transcribe_diarize": {
        "audio_config": {"max_source_positions": 8},
        "text_config": _QWEN3,
        "audio_merge_size": 2,
    },
    "seq2seq-mt5": _T5,
    "seq2seq-musicflamingo": _AUDIO_FLAMINGO | {"audio_bos_token_id": 3, "audio_eos_token_id": 3},
    # Its towers' value projections have as many heads as the queries.
    "seq2seq-nemo_speechlm": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {
                "model_type": "nemotron3_diarization",
                "audio_config": {"num_key_value_heads": 4},
                "head_config": {"audio_hidden_size": 32, "num_speakers": 2},
                "streaming_config": {"num_speakers": 2, "speaker_cache_length": 8},
                "chunk_length": 8,
                "chunk_right_context": 2,
                "fifo_length": 4,
                "speaker_cache_update_period": 4,
            },
        },
        "text_config": {
            "model_type": "nemotron_h",
            "layers_block_type": ["mamba", "attention", "moe", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
        "word_timestamp_config": {"blank_token_id": 98, "num_key_value_heads": 4},
    },
    "seq2seq-omniasr": {
        "audio_config": {
            "model_type": "omniasr_audio",
            "conv_dim": (8, 8),
            "conv_kernel": (4, 2),
            "conv_stride": (4, 2),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        "text_config": _LLAMA,
    },
    "seq2seq-pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "seq2seq-nllb-moe": {"encoder_layers": 3, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "seq2seq-qwen2_audio": {
        "audio_config": {"model_type": "qwen2_audio_encoder", "max_source_positions": 8},
        "text_config": _QWEN2,
    },
    "seq2seq-qwen3_asr": {
        "audio_config": {
            "model_type": "qwen3_asr_encoder",
            # A chunk of 100 frames, which the family takes for 13 states whatever its window.
            "n_window": 50,
            "n_window_infer": 100,
            "downsample_hidden_size": 8,
        },
        "text_config": _QWEN3,
    },
    "seq2seq-switch_transformers": _T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "seq2seq-t5": _T5,
    "seq2seq-t5gemma": {
        "encoder": _SLIDING_AND_FULL
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "decoder": _SLIDING_AND_FULL,
    },
    "seq2seq-t5gemma2": {
        "encoder": {
            "text_config": _SLIDING_AND_FULL,
            "vision_config": {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
        "decoder": _SLIDING_AND_FULL,
    },
    "seq2seq-umt5": _T5,
    "seq2seq-vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _SAMPLES_TO_FRAMES,
        "semantic_tokenizer_encoder_config": _SAMPLES_TO_FRAMES,
        "text_config": _QWEN2,
        "acoustic_tokenizer_chunk_size": 64,
    },
    "seq2seq-voxtral": {
        "audio_config": {
            "model_type": "voxtral_encoder",
            "max_source_positions": 16,
            "intermediate_size": _FOUR_STATES,
        },
        "text_config": _LLAMA,
    },
    "seq2seq-voxtral_realtime": {
        "text_config": {"model_type": "voxtral_realtime_text", "sliding_window": 6},
        "audio_config": {"model_type": "voxtral_realtime_encoder", "sliding_window": 6},
    },
}
