"""Steps that a client of the Hub takes in a process of its own; run as `python hub_client.py STEP FOLDER`.

Each step is one user on one machine: `test_hub.py` gives it a token and a cache (`HF_TOKEN`, `HF_HOME`), which
huggingface_hub reads when it is imported. What a prefix computes where it was made, and what it computes where it was
downloaded, lies as tensors in the folder.
"""

import os
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
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import peft as integration

from adapters import BART, GPT2, logits, prefix_config
from command_line import ROWS, error_of, run, train_on, write_rows
from hf_prefix import PrefixConfig
from hf_prefix.sharing import SavedPrefix
from hf_prefix.training import PrefixTrainer
from quiet_run import training_arguments

SOURCE, TEXT_FILE = ROWS[0]["source"], "text.txt"
OWN_WORDS = "\nMy own words on this prefix.\n"
PROJECTION = {"projection": True, "prefix_init": "real_tokens"}


def llama() -> PreTrainedModel:
    """Return the base model, downloaded."""
    return AutoModelForCausalLM.from_pretrained("me/llama").eval()


def bart() -> PreTrainedModel:
    """Return the encoder-decoder base model, downloaded."""
    return AutoModelForSeq2SeqLM.from_pretrained("me/bart").eval()


def gpt2() -> PreTrainedModel:
    """Return the base model of the command line, downloaded."""
    return AutoModelForCausalLM.from_pretrained("me/gpt2").eval()


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
    return found | _train(folder) | _push_by_command(folder)


def _train(folder: Path) -> dict[str, Tensor]:
    """Train with `push_to_hub=True`, pushing checkpoints or the end only; return the logits at the end."""
    text = list(range(2, 9))
    pushing: dict[str, Any] = {"push_to_hub": True, "max_steps": 2, "learning_rate": 0.1}

    model = get_peft_model(llama(), prefix_config(**PROJECTION))
    saving = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "checkpoint"}
    arguments = training_arguments(
        folder / "run", hub_model_id="me/trained", hub_private_repo=True, **pushing, **saving
    )
    trainer = PrefixTrainer(model, arguments, train_dataset=[{"input_ids": text, "labels": text}])
    trainer.train()
    trainer.push_to_hub()
    found = {"trained": logits(model.eval())}

    model = get_peft_model(bart(), prefix_config(BART, **PROJECTION))
    arguments = training_arguments(folder / "end", hub_model_id="me/end", hub_strategy="end", **pushing)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": text, "labels": text}])
    trainer.train()
    trainer.save_model()
    _check_refused_base(folder, arguments)
    return found | {"end": logits(model.eval())}


def _check_refused_base(folder: Path, arguments: TrainingArguments) -> None:
    """Check that the Hub refuses the card that `Trainer` writes for a base model that lies in a folder."""
    bart().save_pretrained(folder / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(folder / "base")
    arguments.output_dir, arguments.hub_model_id = str(folder / "of-a-folder"), "me/of-a-folder"
    trainer = Trainer(get_peft_model(base, prefix_config(BART)), arguments)
    with pytest.raises(ValueError, match=r'Invalid metadata in README\.md\.\s+- "base_model" with value'):
        trainer.push_to_hub()


def _push_by_command(folder: Path) -> dict[str, Tensor]:
    """Train, push a prefix and a training checkpoint on the command line; return their logits."""
    prefix = folder / "prefix"
    data = write_rows(folder / "pairs.jsonl", ROWS)
    assert train_on(Path("me/gpt2"), data, prefix, "--learning-rate", 1).exit_code == 0
    for name in ("optimizer.pt", "training_args.bin", "notes.txt"):
        (prefix / name).write_bytes(b"mine")
    with (prefix / "README.md").open("a", encoding="utf-8") as card:
        card.write(OWN_WORDS)
    pushed = run("push", prefix, "me/by-command", "--private")
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout.strip().endswith("/me/by-command")
    assert "Left out: curve.png, metrics.json, notes.txt, optimizer.pt, training_args.bin" in pushed.stderr
    found = {"by-command": logits(PeftModel.from_pretrained(gpt2(), prefix))}
    (folder / TEXT_FILE).write_text(run("generate", "--prefix", prefix, SOURCE).stdout, encoding="utf-8")

    assert "Nothing has changed since commit" in run("push", prefix, "me/by-command").stderr

    model = get_peft_model(gpt2(), prefix_config(GPT2, **PROJECTION, num_frozen_tokens=1)).eval()
    model.save_pretrained(folder / "checkpoint-1")
    found["projected"] = logits(model)
    options = ["--revision", "projected", "--message", "With the MLP"]
    assert run("push", folder / "checkpoint-1", "me/by-command", *options).exit_code == 0

    assert "me/summaries is public already" in error_of(run("push", prefix, "me/summaries", "--private"))
    assert "403 Forbidden" in error_of(run("push", prefix, "other/prefix"))
    (prefix / "README.md").write_text("---\nbase_model: /home/me/gpt2\n---\n", encoding="utf-8")
    assert "Invalid metadata in README.md" in error_of(run("push", prefix, "me/by-command"))
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
    trained: dict[str, Any] = own | {"model_id": "me/trained"}
    found["trained"] = logits(PeftModel.from_pretrained(llama(), **trained))
    checkpoint = PeftModel.from_pretrained(llama(), **trained, subfolder="last-checkpoint", is_trainable=True)
    assert checkpoint.peft_config["default"].prefix_projection
    found["trained, from the checkpoint"] = logits(checkpoint.eval())
    SavedPrefix.load("me/by-transformers").save(folder / "copy")
    found["by-transformers copied"] = logits(PeftModel.from_pretrained(llama(), folder / "copy"))
    found["end"] = logits(PeftModel.from_pretrained(bart(), "me/end"))
    start = prefix_config(prefix_init="prefix", prefix_init_path="me/by-transformers")
    found["by-transformers as a start"] = logits(get_peft_model(llama(), start).eval())

    model = PeftModel.from_pretrained(llama(), "me/private", **own)
    model.load_adapter("me/private", "second", **second)
    model.set_adapter("second")
    found["second beside main"] = logits(model)
    _check_refused_downloads(llama())
    if takes_adapters():
        found |= _load_by_transformers(llama(), second)
    return found | _pull_by_command(folder)


def _pull_by_command(folder: Path) -> dict[str, Tensor]:
    """Pull and use prefixes on the command line; return their logits."""
    assert "No token was found" in error_of(run("pull", "me/by-command", "--output", folder / "refused"))
    os.environ.update(HF_TOKEN="hf_reads")
    found = {}
    for name, options in {"by-command": [], "projected": ["--revision", "projected"]}.items():
        pulled = run("pull", "me/by-command", "--output", folder / f"pulled-{name}", *options)
        assert pulled.exit_code == 0, pulled.output
        found[f"{name} pulled"] = logits(PeftModel.from_pretrained(gpt2(), folder / f"pulled-{name}"))
    assert (folder / "pulled-by-command" / "README.md").read_text(encoding="utf-8").endswith(OWN_WORDS)
    text = (folder / TEXT_FILE).read_text(encoding="utf-8")
    for prefix in (folder / "pulled-by-command", "me/by-command"):
        assert run("generate", "--prefix", prefix, SOURCE).stdout == text
    of_revision = ["--prefix", "me/by-command", "--revision", "projected"]
    assert run("generate", *of_revision, SOURCE).stdout != text
    assert "BLEU" in run("evaluate", *of_revision, "--data", folder / "pairs.jsonl").stdout
    assert "me/gpt2" in run("inspect", "me/by-command").stdout
    assert "frozen tokens:  1" in run("inspect", "me/by-command", "--revision", "projected").stdout
    for repo, options, message in [
        ("me/gpt2", [], "holds no prefix on the Hub"),
        ("me/pickled", [], "holds no adapter_model.safetensors"),
        ("me/missing", [], "Repository Not Found"),
        ("me/by-command", ["--revision", "third"], "Revision Not Found"),
    ]:
        assert message in error_of(run("pull", repo, "--output", folder / "refused", *options))
        assert message in error_of(run("inspect", repo, *options))
    assert not (folder / "refused").exists()
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
