"""Steps that a client of the Hub takes in a process of its own; run as `python hub_client.py STEP FOLDER`.

Each step is one user on one machine: `test_hub.py` gives it a token and a cache (`HF_TOKEN`, `HF_HOME`), which
huggingface_hub reads when it is imported. What a prefix computes where it was made, and what it computes where it was
downloaded, lies as tensors in the folder.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.integrations import peft as integration

from adapters import BART, logits, prefix_config
from hf_prefix import PrefixConfig

PROJECTION = {"projection": True, "prefix_init": "real_tokens"}


def llama() -> PreTrainedModel:
    """Return the base model, downloaded."""
    return AutoModelForCausalLM.from_pretrained("me/llama").eval()


def bart() -> PreTrainedModel:
    """Return the encoder-decoder base model, downloaded."""
    return AutoModelForSeq2SeqLM.from_pretrained("me/bart").eval()


def takes_adapters() -> bool:
    """Whether transformers' own adapter methods take the installed PEFT; 5.24's ask for one that is not out yet."""
    try:
        integration.check_peft_version(min_version=integration.MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


def publish(folder: Path) -> dict[str, Tensor]:
    """Push prefixes by PEFT's and transformers' own methods; return their logits."""
    found = {}
    model = get_peft_model(llama(), prefix_config(**PROJECTION)).eval()
    model.push_to_hub("me/private", private=True)
    found["main"] = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    # Pushed without a change to main.
    model.push_to_hub("me/private", revision="second", commit_message="A second one")
    found["second"] = logits(model)

    config = prefix_config(**PROJECTION, prefix_init_seed=5)
    model = llama()
    if takes_adapters():
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config).eval()
    model.push_to_hub("me/by-transformers")
    found["by-transformers"] = logits(model)

    model = get_peft_model(bart(), prefix_config(BART, **PROJECTION)).eval()
    model.push_to_hub("me/summaries")
    found["summaries"] = logits(model)
    _check_refused_pushes(model)
    return found


def _check_refused_pushes(model: PeftModel) -> None:
    for name, token, message in [
        ("other/prefix", None, "403 Forbidden"),
        ("me/prefix", "hf_reads", "403 Forbidden"),
        ("me/prefix", "wrong", "401"),
    ]:
        with pytest.raises(HfHubHTTPError, match=message):
            model.push_to_hub(name, token=token)
    api, head = HfApi(), HfApi().model_info("me/summaries").sha
    more: dict[str, Any] = {"repo_id": "me/summaries", "path_in_repo": "more.json"}
    api.upload_file(**more, path_or_fileobj=b"{}", parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(**more, path_or_fileobj=b"[]", parent_commit=head)


def download(folder: Path) -> dict[str, Tensor]:
    """Load what was pushed by PEFT's and transformers' own methods, without a token where none is needed."""
    own: dict[str, Any] = {"token": "hf_reads"}
    second = own | {"revision": "second"}
    assert not PrefixConfig.from_pretrained("me/private", **own).prefix_projection
    found = {
        "main": logits(PeftModel.from_pretrained(llama(), "me/private", **own)),
        "second": logits(PeftModel.from_pretrained(llama(), "me/private", **second)),
        "by-transformers": logits(PeftModel.from_pretrained(llama(), "me/by-transformers")),
        "summaries": logits(PeftModel.from_pretrained(bart(), "me/summaries")),
        "second by auto class": logits(AutoPeftModelForCausalLM.from_pretrained("me/private", **second).eval()),
    }
    commit = HfApi().model_info("me/private", **second).sha
    found["second by commit"] = logits(PeftModel.from_pretrained(llama(), "me/private", revision=commit, **own))
    start = prefix_config(prefix_init="prefix", prefix_init_path="me/by-transformers")
    found["by-transformers as a start"] = logits(get_peft_model(llama(), start).eval())

    model = PeftModel.from_pretrained(llama(), "me/private", **own)
    model.load_adapter("me/private", "second", **second)
    model.set_adapter("second")
    found["second beside main"] = logits(model)
    _check_refused_downloads(llama())
    if takes_adapters():
        found |= _load_by_transformers(llama(), second)
    return found


def _load_by_transformers(model: PreTrainedModel, second: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    model.load_adapter("me/by-transformers", "public")
    found["by-transformers by its own method"] = logits(model)
    model.load_adapter("me/private", "private", adapter_kwargs=second)
    model.set_adapter("private")
    found["second by transformers"] = logits(model)
    model.set_adapter("public")
    found["by-transformers beside it"] = logits(model)
    with pytest.raises(OSError, match="third is not a valid git identifier"):
        model.load_adapter("me/by-transformers", adapter_kwargs={"revision": "third"})
    return found


def _check_refused_downloads(model: PreTrainedModel) -> None:
    refused: list[tuple[dict[str, str], type[Exception], str]] = [
        ({}, RepositoryNotFoundError, "401 Client Error"),
        ({"token": "hf_other"}, RepositoryNotFoundError, "404 Client Error"),
        ({"token": "wrong"}, HfHubHTTPError, "Invalid credentials"),
        ({"token": "hf_me", "revision": "third"}, ValueError, r"Can't find 'adapter_config\.json'"),
    ]
    for options, error, message in refused:
        with pytest.raises(error, match=message):
            PeftModel.from_pretrained(model, "me/private", **options)
    # A repository of a whole model holds no prefix.
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(model, "me/llama")


STEPS: dict[str, Callable[[Path], dict[str, Tensor]]] = {"publish": publish, "download": download}

if __name__ == "__main__":
    step, folder = sys.argv[1], Path(sys.argv[2])
    save_file(STEPS[step](folder), folder / f"{step}.safetensors")
