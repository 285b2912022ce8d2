"""Tiny models of every entry of transformers' causal and sequence-to-sequence mappings, built in memory.

A configuration is made small by the names of its fields, which families share. What this does not bring to a
working model of its family stands in `OVERRIDES`, with values that are as small as the family allows.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from zoo_overrides import OVERRIDES, VARIANTS

VOCABULARY = 99
PAD, BEGIN, END, START, SPECIAL = 0, 1, 2, 3, 4
FIRST_WORD = 5
"""Ids below are special."""
WIDTH = 32
HEADS = 4
WINDOW = 16
"""Tokens that sliding, chunked and selecting attention see at most."""
LARGEST = 3_000_000
"""Most parameters that a tiny model may have."""

# By field name, for every configuration and those nested in it.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("unpadded_vocab_size", "audio_vocab_size", "t2u_vocab_size", "char_vocab_size"), VOCABULARY),
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "decoder_start_token_id": START,
    "sep_token_id": SPECIAL,
    "cls_token_id": SPECIAL,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), WIDTH),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "output_dim", "output_proj_dims"), WIDTH),
    **dict.fromkeys(("backbone_hidden_size", "input_size", "hidden_dim", "adapter_out_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "speech_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("t2u_encoder_attention_heads", "t2u_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    "swa_num_attention_heads": HEADS,
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "v_head_dim", "kv_channels", "swa_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "kv_lora_rank"), 4),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "mlp_dim"), 16),
    **dict.fromkeys(("shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim"), 16),
    **dict.fromkeys(("dff", "dim_ff", "feed_forward_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group", "n_groups"), 2),
    "topk_group": 2,
    "expert_capacity": 64,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 128),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 128),
    "original_max_position_embeddings": 128,
    "max_source_positions": 32,
    **dict.fromkeys(("num_mel_bins", "feature_size"), 16),
    **dict.fromkeys(("image_size", "crop_size"), 32),
    "patch_size": 16,
    **dict.fromkeys(("rotary_dim", "index_n_heads"), 4),
    "index_head_dim": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 8,
    "codebook_size": 16,
    "num_codebooks": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_heads", "laurel_rank"), HEADS),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "index_topk"), WINDOW),
}
# A list of the kind of each layer.
LAYER_KINDS = ("layer_types", "mlp_layer_types", "indexer_types", "block_types", "attn_layers")
# Encoders that also serve as decoders are causal only where they are told so.
AS_DECODER: dict[str, Any] = {"is_decoder": True, "add_cross_attention": False, "causal": True}
_SPECIAL_ENDINGS = ("_token_id", "_token_index", "_token_idx")


@dataclass(frozen=True)
class Entry:
    """One entry of a mapping.

    Args:
        model_type: Its key.
        class_name: The model class that it names.
        is_seq2seq: Whether it stands in the mapping of sequence-to-sequence models.
        variant: Name of another choice of attention in its configuration, or "".
    """

    model_type: str
    class_name: str
    is_seq2seq: bool
    variant: str = ""

    @property
    def name(self) -> str:
        """Name in test ids."""
        name = f"{'seq2seq' if self.is_seq2seq else 'causal'}-{self.model_type}"
        return f"{name}-{self.variant}" if self.variant else name


def entries() -> list[Entry]:
    """Return every entry of both mappings of the installed transformers, in their order."""
    mappings = ((MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, False), (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, True))
    return [Entry(key, name, is_seq2seq) for names, is_seq2seq in mappings for key, name in names.items()]


def variants() -> list[Entry]:
    """Return further models of the entries whose configuration chooses between kinds of attention."""
    return [
        dataclasses.replace(entry, variant=variant) for entry in entries() for variant in VARIANTS.get(entry.name, ())
    ]


def small_config(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    """Return a small configuration.

    Args:
        config_class: Its class.
        changes: Values to take instead of the shared ones; for a nested configuration, a dictionary of the same kind,
            perhaps with another `model_type`, or None to leave it at what the class makes of it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    fields = defaults.keys()
    chosen = {name: value for name, value in SMALL.items() if name in fields}
    for name in fields - SMALL.keys():
        if name.endswith(_SPECIAL_ENDINGS):
            chosen[name] = SPECIAL
    if defaults.get("sliding_window", WINDOW) is None:
        # The family has no window unless it is asked for.
        chosen["sliding_window"] = None
    if {"kv_lora_rank", "num_key_value_heads"} <= fields:
        # Multi-head latent attention: one key and value per query head.
        chosen["num_key_value_heads"] = HEADS
    chosen |= _each_kind_of_layer(config_class, changes)
    others: dict[str, PreTrainedConfig] = {}
    for name, nested_class in _nested(config_class).items():
        own = changes.get(name, {})
        if not isinstance(own, dict) or (not own and nested_class is AutoConfig):
            continue
        part = _small_part(nested_class, own)
        (chosen if nested_class is AutoConfig or isinstance(part, nested_class) else others)[name] = part
        changes = {key: value for key, value in changes.items() if key != name}
    config = config_class(**chosen | changes)
    # Past the validation, by which the field takes its own class only.
    vars(config).update(others)
    return config


def _small_part(nested_class: Any, changes: dict[str, Any]) -> PreTrainedConfig:
    """Return a small nested configuration, of the class that `changes` names if they name one."""
    own = dict(changes)
    if "model_type" in own:
        nested_class = CONFIG_MAPPING[own.pop("model_type")]
    return small_config(nested_class, own)


def _nested(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the classes of the configurations inside one, by field name."""
    return config_class.sub_configs or {}


def _each_kind_of_layer(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """Return fields for one layer of each kind that the family has by default, and for at least two layers."""
    names = [field.name for field in dataclasses.fields(config_class) if field.name in LAYER_KINDS]
    if not names:
        return {}
    usual = config_class()
    kinds = {name: list(changes.get(name, dict.fromkeys(getattr(usual, name) or ()))) for name in names}
    count = changes.get("num_hidden_layers", max(2, *map(len, kinds.values())))
    chosen: dict[str, Any] = {name: (found + found[-1:] * count)[:count] for name, found in kinds.items() if found}
    return chosen | {"num_hidden_layers": count} if "num_hidden_layers" in dir(config_class) else chosen


def _taken_by(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a configuration that a model class takes, as `AutoModelForCausalLM` chooses it."""
    for name, nested_class in _nested(type(config)).items():
        if nested_class is model_class.config_class:
            part: PreTrainedConfig = getattr(config, name)
            return part
    return config


def _changes(entry: Entry) -> dict[str, Any]:
    """Return the values of an entry that its field names do not say."""
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[entry.model_type])}
    decoder = {} if entry.is_seq2seq else {name: value for name, value in AS_DECODER.items() if name in fields}
    return decoder | OVERRIDES.get(entry.name, OVERRIDES.get(entry.model_type, {}))


def build(entry: Entry, attn_implementation: str = "eager", seed: int = 0) -> PreTrainedModel:
    """Return a tiny model in evaluation mode, always the same for a seed.

    Its weights are spread wider than a fresh model's, so that attention differs between positions and a test that
    compares outputs can fail.
    """
    model_class = getattr(transformers, entry.class_name)
    config = _taken_by(model_class, small_config(CONFIG_MAPPING[entry.model_type], _changes(entry)))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{entry.name} would have {size:,} parameters; make it smaller in zoo_overrides.py.")
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
            elif name.endswith("_gate"):
                # Gates of cross-attention start closed.
                parameter.fill_(0.5)
            elif name.endswith("self_attn.A"):
                # At its start of zero the tokens that Doge selects are all as good.
                parameter.normal_(std=0.2)
    # Without the settings of the family's own checkpoints, such as tokens that are forced or suppressed.
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END, decoder_start_token_id=START
    )
    model.set_attn_implementation(attn_implementation)
    return model.eval()


def words(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random words [rows, length], none twice in a row and no special tokens among them.

    Attention that selects the best of its tokens would have to choose between equal ones.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(VOCABULARY - FIRST_WORD, generator=generator)[:length] for _ in range(rows)]
    return torch.stack(drawn) + FIRST_WORD
