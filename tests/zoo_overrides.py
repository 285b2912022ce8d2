"""What the field names do not say: per entry or model type, the values that make its tiny model whole and typical."""

from typing import Any

from zoo_overrides_speech import SEQ2SEQ_OVERRIDES, SEQ2SEQ_VARIANTS

_SLIDING_AND_FULL: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_LINEAR_AND_FULL: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_CONV_AND_FULL: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}
# The last two layers attend to the keys and values of the first two.
_SHARED_LAYERS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_GEMMA3N: dict[str, Any] = _SHARED_LAYERS | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]}
# Heads of layers with full attention are larger.
_GEMMA4_UNIFIED: dict[str, Any] = _SHARED_LAYERS | {"global_head_dim": 16}
_GEMMA4: dict[str, Any] = _GEMMA4_UNIFIED | {"num_experts": None}
_GEMMA4_VISION: dict[str, Any] = {"num_key_value_heads": 4, "position_embedding_size": 16}
_GEMMA4_AUDIO: dict[str, Any] = {"subsampling_conv_channels": [4, 4]}
_GEMMA4_ASSISTANT: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
    "num_experts": None,
    "global_head_dim": 16,
}
_SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model"}
_DOTS3: dict[str, Any] = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "sliding_window": 16,
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_q_lora_rank", "swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
    "swa_kv_lora_rank": 4,
    "swa_head_dim": 12,
}
_QWEN4_EXP: dict[str, Any] = {
    "hc_lowrank": 4,
    # Embeddings of the last tokens, kept as another state in the cache.
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_FALCON_NEW: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2}
_DEEPSEEK_V2: dict[str, Any] = {"topk_method": "group_limited_greedy"}
_REFORMER: dict[str, Any] = {
    "attention_head_size": 8,
    # With axial positions it trains on rows of one length only.
    "axial_pos_embds": False,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_buckets": 4,
    # Otherwise the buckets are drawn anew in each forward pass.
    "hash_seed": 0,
}

CAUSAL_OVERRIDES: dict[str, dict[str, Any]] = {
    # Block-sparse attention is not causal, and short rows switch the model to full attention, once and for all.
    "causal-big_bird": {"attention_type": "original_full"},
    "causal-big_bird-block-sparse": {"block_size": 2, "num_random_blocks": 1},
    "causal-blt": {
        # By this field, which its configuration lacks, transformers 5.23 sizes the cache.
        "num_hidden_layers": 2,
        "patching_threshold": 4.5,
        "local_attention_window_len": 16,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "decoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "global_config": {"hidden_size": 64, "num_key_value_heads": 4},
        "patcher_config": {"num_key_value_heads": 4},
    },
    # Layers with full attention have no positions.
    "causal-cohere_compass_text": _SLIDING_AND_FULL
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "full_attention": None,
        }
    },
    "causal-dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "causal-deepseek_v2": _DEEPSEEK_V2,
    "causal-deepseek_v2-no-query-compression": _DEEPSEEK_V2 | {"q_lora_rank": None},
    "causal-deepseek_v4": {
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        # Compressed entries, of four tokens each.
        "index_topk": 4,
        "o_groups": 2,
    },
    "causal-doge-selecting": {"keep_window_size": 16},
    "causal-dots1": _SLIDING_AND_FULL | {"n_shared_experts": 1},
    "causal-dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32},
        "audio_config": {"adapter_input_size": 32},
    },
    "causal-dots3_note_text": _DOTS3,
    "causal-falcon-alibi": {"alibi": True},
    "causal-falcon-multi-head": {"multi_query": False},
    "causal-falcon-new-architecture": _FALCON_NEW,
    "causal-falcon_h1": {"mamba_d_ssm": 64},
    "causal-flint": {"mlp_only_layers": [0]},
    "causal-fuyu": {"text_config": {"model_type": "persimmon"}},
    "causal-gemma3": {"vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    "causal-gemma3n": {
        "text_config": _GEMMA3N,
        # Its own tower needs timm and torchvision; text runs none.
        "vision_config": _SIGLIP | {"vocab_size": 8, "vocab_offset": 99, "rms_norm_eps": 1e-6},
        "audio_config": {
            "conf_num_attention_heads": 4,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [4, 4],
            "input_feat_size": 16,
            "vocab_size": 8,
            "vocab_offset": 107,
        },
    },
    "causal-gemma3n_text": _GEMMA3N,
    "causal-gemma4": {"text_config": _GEMMA4, "vision_config": _GEMMA4_VISION, "audio_config": _GEMMA4_AUDIO},
    "causal-gemma4_assistant": {"text_config": _GEMMA4_ASSISTANT, "backbone_hidden_size": 32},
    "causal-gemma4_text": _GEMMA4,
    "causal-gemma4_text-keys-are-values": {
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "causal-gemma4_unified": {
        "text_config": _GEMMA4_UNIFIED,
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        "audio_config": {"audio_embed_dim": 32},
    },
    "causal-gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 2, "global_head_dim": 16}
    },
    "causal-gemma4_unified_text": _GEMMA4_UNIFIED,
    "causal-glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "causal-got_ocr2": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"output_channels": 8, "global_attn_indexes": [1], "window_size": 2},
    },
    "causal-gpt_bigcode-multi-head": {"multi_query": False},
    "causal-gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "causal-granitemoehybrid": _LINEAR_AND_FULL,
    "causal-hrm_text": {"num_hidden_layers": 1, "L_cycles": 2},
    # Two layers in the middle run twice.
    "causal-dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "causal-inkling2_loop_text": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 4,
    },
    "causal-hy_v4": {"indexer_types": ["full", "shared"]},
    "causal-bamba": {"attn_layer_indices": [1]},
    "causal-bailing_hybrid": _LINEAR_AND_FULL | {"short_conv_kernel_size": 4},
    "causal-jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "causal-laguna": _SLIDING_AND_FULL | {"num_attention_heads_per_layer": [4, 8]},
    "causal-lfm2": _CONV_AND_FULL,
    "causal-lfm2_moe": _CONV_AND_FULL,
    "causal-longcat_flash": {"head_dim": 4, "zero_expert_num": 2, "ffn_hidden_size": 48},
    "causal-mamba2": {"num_heads": 8},
    "causal-mellum": _SLIDING_AND_FULL,
    "causal-ministral": _SLIDING_AND_FULL,
    "causal-minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 4,
    },
    # Text alone passes by the layer with cross-attention.
    "causal-mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    },
    "causal-modernbert-decoder": {"local_attention": 32},
    # Its mask knows no window; the window of its checkpoints is as long as their positions.
    "causal-moshi": {"sliding_window": 128},
    "causal-mpt-learned-positions": {"attn_config": {"alibi": False}},
    "causal-nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "causal-phi3-sliding": {"sliding_window": 16},
    "causal-phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 8,
            "bias_max_distance": 16,
        },
    },
    "causal-prophetnet": {"ngram": 2},
    # With more streams or heads, transformers 5.23 mixes up their distances: its tokens see later ones.
    "causal-prophetnet-one-head": {"ngram": 1, "num_decoder_attention_heads": 1},
    "causal-recurrent_gemma-attention": {"block_types": ["attention"]},
    "causal-qwen2-sliding": _SLIDING_AND_FULL | {"use_sliding_window": True},
    "causal-qwen4_exp": {"text_config": _QWEN4_EXP},
    "causal-qwen4_exp_text": _QWEN4_EXP,
    "causal-reformer": _REFORMER,
    "causal-roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 16,
        "shape_embed_dim": 8,
        "shape_vocab_size": 16,
    },
    "causal-smollm3": {"no_rope_layer_interval": 2},
    "causal-starcoder2-sliding": {"sliding_window": 16},
    "causal-xlnet-causal": {"attn_type": "uni"},
    # Its heads are made of multiples of 64.
    "causal-xlstm": {"hidden_size": 128},
    "causal-xmod": {"default_language": "en_XX"},
    "causal-zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "causal-zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        # The smallest step is not applied when decoding with the cache.
        "time_step_min": 1e-6,
    },
    "causal-zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 16,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
}

_ASSISTANT = (
    "All its layers attend to the keys and values of another model, which its forward is given besides inputs_embeds: "
    "it is no language model by itself. transformers 5.23 cannot build one either, because kv_sharing_modes of its "
    "text configuration asks for a layer of its own of each kind."
)
NO_MODEL: dict[str, str] = {"causal-gemma4_assistant": _ASSISTANT, "causal-gemma4_unified_assistant": _ASSISTANT}
"""Entries of which no model can be built that takes input_ids, with the reason."""

CAUSAL_VARIANTS: dict[str, tuple[str, ...]] = {
    "causal-big_bird": ("block-sparse",),
    "causal-deepseek_v2": ("no-query-compression",),
    "causal-doge": ("selecting",),
    "causal-falcon": ("alibi", "multi-head", "new-architecture"),
    "causal-gemma4_text": ("keys-are-values",),
    "causal-gpt_bigcode": ("multi-head",),
    "causal-mpt": ("learned-positions",),
    "causal-phi3": ("sliding",),
    "causal-qwen2": ("sliding",),
    "causal-prophetnet": ("one-head",),
    "causal-recurrent_gemma": ("attention",),
    "causal-starcoder2": ("sliding",),
    "causal-xlnet": ("causal",),
}

OVERRIDES: dict[str, dict[str, Any]] = CAUSAL_OVERRIDES | SEQ2SEQ_OVERRIDES
VARIANTS: dict[str, tuple[str, ...]] = CAUSAL_VARIANTS | SEQ2SEQ_VARIANTS
"""Entries whose configuration chooses between kinds of attention: names of the choices that are built besides."""
