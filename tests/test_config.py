"""The configuration: what it refuses, and that it survives being saved."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from hf_prefix import PrefixConfig, PrefixError

INVALID = [
    ({}, "num_virtual_tokens is missing"),
    ({"prefix_init": "zero"}, "num_virtual_tokens is missing.*'zero'"),
    ({"num_virtual_tokens": 0}, "at least 1, got 0"),
    ({"num_virtual_tokens": -3}, "at least 1, got -3"),
    ({"num_virtual_tokens": 2.5}, "whole number.*got 2.5"),
    ({"num_virtual_tokens": "5"}, "whole number.*got '5'"),
    ({"num_virtual_tokens": True}, "whole number.*got True"),
    ({"num_virtual_tokens": 5, "num_frozen_tokens": -1}, "num_frozen_tokens must be.*at least 0, got -1"),
    ({"num_virtual_tokens": 5, "num_frozen_tokens": True}, "num_frozen_tokens must be.*got True"),
    ({"num_virtual_tokens": 5, "num_frozen_tokens": 1.0}, "num_frozen_tokens must be.*got 1.0"),
    ({"num_virtual_tokens": 5, "num_frozen_tokens": 5}, "num_frozen_tokens=5 leaves nothing.*num_virtual_tokens=5"),
    ({"num_virtual_tokens": 5, "projection_init": "sgd"}, "projection_init must be one of.*got 'sgd'"),
    (
        {"num_virtual_tokens": 5, "projection_init": "mse"},
        "'mse' has no effect without the projection",
    ),
    (
        {"num_virtual_tokens": 5, "prefix_projection": True, "projection_init": "mse", "prefix_init": "random"},
        "projection_init='mse' has no effect with prefix_init='random'",
    ),
    ({"num_virtual_tokens": 5, "roles": []}, r"roles must be some of.*got \[\]"),
    ({"num_virtual_tokens": 5, "roles": ["encoder", "memory"]}, "roles must be some of.*memory"),
    ({"num_virtual_tokens": 5, "roles": "decoder"}, "roles must be some of.*got 'decoder'"),
    ({"num_virtual_tokens": 5, "prefix_init": "gaussian"}, "prefix_init must be one of.*got 'gaussian'"),
    (
        {"num_virtual_tokens": 5, "sliding_window": "scroll", "offset_positions": False},
        "must stand behind it; leave offset_positions out",
    ),
    ({"num_virtual_tokens": 5, "sliding_window": "drop"}, "sliding_window must be.*got 'drop'"),
    ({"num_virtual_tokens": 5, "prefix_dropout": 1.0}, "prefix_dropout must be.*got 1.0"),
    ({"num_virtual_tokens": 5, "prefix_dropout": -0.1}, "prefix_dropout must be.*got -0.1"),
    ({"num_virtual_tokens": 5, "prefix_dropout": float("nan")}, "prefix_dropout must be.*got nan"),
    ({"num_virtual_tokens": 5, "prefix_dropout": "0.1"}, "prefix_dropout must be.*got '0.1'"),
    ({"num_virtual_tokens": 5, "encoder_hidden_size": 8}, "encoder_hidden_size=8 has no effect"),
    (
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 0},
        "encoder_hidden_size must be.*got 0",
    ),
    (
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 1.5},
        "encoder_hidden_size must be.*got 1.5",
    ),
    (
        {"num_virtual_tokens": 5, "embedding_only": True, "prefix_projection": True},
        "embedding_only=True learns input embeddings, prefix_projection=True an MLP",
    ),
    (
        {"num_virtual_tokens": 5, "embedding_only": True, "prefix_init": "prefix", "prefix_init_path": "a"},
        "cannot start from the keys and values of another prefix",
    ),
    (
        {"num_virtual_tokens": 5, "embedding_only": True, "num_frozen_tokens": 2},
        "num_frozen_tokens=2 would have none to keep",
    ),
    ({"num_virtual_tokens": 5, "embedding_only": True, "roles": ["encoder"]}, r"decoder-only models, got roles="),
    ({"num_virtual_tokens": 5, "placement": "suffix"}, "placement must be one of.*got 'suffix'"),
    ({"num_virtual_tokens": 5, "infix_separator_token_id": 7}, "infix_separator_token_id=7 is only used with"),
    ({"num_virtual_tokens": 5, "placement": "infix"}, "needs infix_separator_token_id.*got None"),
    ({"num_virtual_tokens": 5, "placement": "infix", "infix_separator_token_id": -1}, "ends a prompt, got -1"),
    ({"num_virtual_tokens": 5, "placement": "infix", "infix_separator_token_id": True}, "ends a prompt, got True"),
    (
        {"num_virtual_tokens": 5, "placement": "infix", "infix_separator_token_id": 7, "sliding_window": "scroll"},
        "leave sliding_window and offset_positions out",
    ),
    (
        {"num_virtual_tokens": 5, "placement": "infix", "infix_separator_token_id": 7, "offset_positions": True},
        "leave sliding_window and offset_positions out",
    ),
    ({"prefix_init": "text"}, "prefix_init='text' needs prefix_init_text, got None"),
    ({"prefix_init": "text", "prefix_init_text": ""}, "needs prefix_init_text, got ''"),
    ({"prefix_init": "token_ids"}, "needs prefix_init_token_ids, got None"),
    ({"prefix_init": "token_ids", "prefix_init_token_ids": []}, r"needs prefix_init_token_ids, got \[\]"),
    ({"num_virtual_tokens": 5, "prefix_init": "prefix"}, "needs prefix_init_path, got None"),
    ({"num_virtual_tokens": 5, "prefix_init_text": "a"}, "prefix_init_text is only used with"),
    ({"num_virtual_tokens": 5, "prefix_init_token_ids": [7]}, "prefix_init_token_ids is only used with"),
    ({"num_virtual_tokens": 5, "prefix_init_path": "a"}, "prefix_init_path is only used with"),
    ({"num_virtual_tokens": 5, "tokenizer_name_or_path": "a"}, "tokenizer_name_or_path='a' is only used"),
    ({"num_virtual_tokens": 5, "target_modules": "all-linear"}, "all-linear.*adapt linear layers"),
    ({"num_virtual_tokens": 5, "trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
    (
        {"num_virtual_tokens": 5, "target_modules": ".*attn", "layers_to_transform": [0]},
        "layers_to_transform=.* has no effect",
    ),
    ({"num_virtual_tokens": 5, "layers_pattern": "layers"}, "layers_pattern='layers' has no effect"),
]


@pytest.mark.parametrize(("options", "message"), INVALID, ids=lambda value: str(value)[:60])
def test_impossible_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefixError, match=message):
        PrefixConfig(**options)


def test_length_may_come_from_text_or_tokens() -> None:
    assert PrefixConfig(prefix_init="text", prefix_init_text="a b").num_virtual_tokens is None
    assert PrefixConfig(prefix_init="token_ids", prefix_init_token_ids=[7]).num_virtual_tokens is None


def test_projection_has_the_papers_width_by_default() -> None:
    assert PrefixConfig(num_virtual_tokens=5, prefix_projection=True).hidden_size == 512
    assert PrefixConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=800).hidden_size == 800


FULL = PrefixConfig(
    task_type="SEQ_2_SEQ_LM",
    num_virtual_tokens=4,
    num_frozen_tokens=1,
    roles=["encoder", "cross"],
    prefix_projection=True,
    encoder_hidden_size=16,
    prefix_dropout=0.25,
    prefix_init="text",
    prefix_init_text="summarise: é",
    prefix_init_seed=3,
    projection_init="mse",
    tokenizer_name_or_path="somewhere",
    sliding_window="scroll",
    offset_positions=True,
    target_modules=["self_attn", "encoder_attn"],
    exclude_modules=r".*\.1\..*",
    layers_to_transform=[0, 1],
    layers_pattern="layers",
    modules_to_save=["lm_head"],
)


def test_saved_configuration_is_plain_json_and_comes_back_the_same(tmp_path: Path) -> None:
    FULL.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["peft_type"] == "HF_PREFIX"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is PrefixConfig
    changed = {
        name: (before, after)
        for (name, before), after in zip(asdict(FULL).items(), asdict(loaded).values(), strict=True)
        if before != after
    }
    assert changed == {"initialized": (False, True), "format_version": (None, 1)}


def test_saving_does_not_mark_the_configuration_in_memory(tmp_path: Path) -> None:
    config = PrefixConfig(num_virtual_tokens=2)
    config.save_pretrained(tmp_path)
    assert not config.initialized
    config.initialized = True
    config.save_pretrained(tmp_path)
    assert config.initialized


def test_dictionary_form_is_json() -> None:
    assert json.loads(json.dumps(FULL.to_dict()))["num_virtual_tokens"] == 4
