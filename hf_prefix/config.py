"""The configuration of a prefix: every option, checked at construction."""

import copy
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig, TaskType
from peft.utils import CONFIG_NAME

from hf_prefix.errors import PrefixError, PrefixFileError
from hf_prefix.peft_type import PrefixPeftType
from hf_prefix.sharing.export import check_format, export_weights, is_checkpoint, saved_digest
from hf_prefix.sharing.field_types import declared_types, has_type
from hf_prefix.sharing.fingerprint import BaseFingerprint, check_sample
from hf_prefix.sharing.folding import AttentionModule
from hf_prefix.sharing.interrupted_save import finish_interrupted, unfinished, write_whole
from hf_prefix.sharing.model_card import write_card
from hf_prefix.sharing.weights_file import check_agrees, check_digest, find_weights, read_configuration, read_header

Role = Literal["encoder", "decoder", "cross"]
"""Where a prefix acts: encoder self-attention, decoder self-attention (the only one of a decoder-only model),
or the decoder's cross-attention."""

PrefixInit = Literal["real_tokens", "text", "token_ids", "prefix", "zero", "random"]
ProjectionInit = Literal["least_squares", "mse"]
SlidingWindow = Literal["pin", "scroll"]
Placement = Literal["prefix", "infix"]

DEFAULT_HIDDEN_SIZE = 512
"""Hidden width of the projection for table-to-text in the paper (§4.3, footnote; 800 for summarisation)."""

FORMAT_VERSION = 1
"""Version of the saved form. It grows when an older release would read a folder wrongly."""


@dataclass
class PrefixConfig(PeftConfig):
    """What a prefix is and where it goes (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

    Args:
        num_virtual_tokens: Length P of the prefix: key/value vectors that every attention layer gets. May be None
            with `prefix_init="text"` or `"token_ids"`, which then decide it.
        num_frozen_tokens: How many of the first virtual tokens stay as they start, fewer than all. A first token
            that much attention rests on (an attention sink, https://arxiv.org/abs/2309.17453) is not worn away then.
        roles: Which attention gets a prefix: any of "encoder", "decoder", "cross". None means all that the model
            has, as in the paper.
        prefix_projection: Learn the prefix through the paper's MLP (§4.3), P[i] = MLP(P'[i]), instead of
            directly. One embedding and one hidden layer per role, and one output slice per attention module.
        encoder_hidden_size: Hidden width of that MLP (512 when None). Only with `prefix_projection`.
        keep_projection: Save the MLP, too. By default `save_pretrained` folds it into the keys and values that it
            computes, which is all that using the prefix needs; checkpoints of a training run (folders named
            `checkpoint-<n>`) always hold it. Only with `prefix_projection`.
        embedding_only: Learn input embeddings of the virtual tokens only (§7.2, "embedding-only"): the keys and values
            of every layer are what the frozen model computes of them. Decoder-only models. Needs non-reentrant
            gradient checkpointing, if any. `prefix_init` then gives embeddings.
        prefix_dropout: Dropout probability on the final keys and values, in training only (0.0 in the paper). Frozen
            tokens are spared.
        prefix_init: Where the prefix starts. "real_tokens": activations of random tokens of the vocabulary (the
            paper's §7.4 finds real words far ahead of random numbers); "text": activations of
            `prefix_init_text`; "token_ids": of `prefix_init_token_ids`; "prefix": a saved prefix
            (`prefix_init_path`); "zero": zeros; "random": N(0, 1), or PyTorch's defaults for the projection, as
            in the original code.
        prefix_init_text: The text for `prefix_init="text"`.
        prefix_init_token_ids: The token ids for `prefix_init="token_ids"`.
        prefix_init_path: Folder or Hub id of the prefix for `prefix_init="prefix"`.
        prefix_init_seed: Seed of "real_tokens" and "random".
        projection_init: How the projection is brought to where the prefix starts. "least_squares": the output layer is
            solved for it, which is exact while the learned tokens are at most as many as `encoder_hidden_size`;
            "mse": 500 steps of Adam on the mean squared error, as in the original code, which comes near it. Only with
            `prefix_projection`, and a start other than "random".
        tokenizer_name_or_path: Tokenizer for `prefix_init_text`; the base model's own when None.
        sliding_window: What layers with a sliding window do. "pin": every position sees the whole prefix (the
            paper's definition). "scroll": the prefix leaves the window as a real prompt would.
        offset_positions: Whether real tokens come after the prefix, at positions P, P+1, ... None: yes in
            decoder-only models, no in encoder-decoder models (both as in the paper). With relative positions (T5)
            the prefix always comes before the sequence, and False is refused.
        placement: Where the virtual tokens stand. "prefix": in front of all tokens. "infix": behind the prompt x of
            each row, [x ; INFIX ; y] (§7.3), so that the tokens of x do not see them. Decoder-only models with eager
            attention or SDPA, without a cache or with the default one.
        infix_separator_token_id: The token that ends a prompt, for `placement="infix"`: x reaches to its last
            occurrence in a row, so y must not contain it.
        target_modules: Restricts the prefix to these attention modules (suffixes or one regular expression);
            None means every attention module of the roles.
        exclude_modules: Attention modules that get no prefix (suffixes or one regular expression).
        layers_to_transform: Restricts the prefix to these layer indices.
        layers_pattern: Name of the module list that `layers_to_transform` counts in, for example "layers".
        modules_to_save: Modules of the base model that are trained and saved as well.
        trainable_token_indices: Must stay None; read by other libraries.
        attention_modules: Filled in when the prefix is attached: role, kv_heads, key_size and value_size of each
            attention module that got it. A saved prefix is attached only to a model that has exactly these.
        initialized: Written as true when the configuration is saved: a prefix attached from it waits for its
            weights instead of starting anew.
        format_version: Version of the saved form; written when the configuration is saved.
        base_fingerprint: Filled in when the prefix is attached: what it depends on in the base model. A saved prefix
            is attached only to a model that agrees.
        weights_sha256: Written when the configuration is saved beside weights: the digest of what they hold. Delete it
            from a folder whose weights are changed on purpose.
        allow_other_base: Attach a saved prefix to another base model than its own, if its attention modules fit. Never
            saved.

    Raises:
        PrefixError: A value is impossible, or an option was given that the others leave without effect.
    """

    num_virtual_tokens: int | None = field(default=None)
    num_frozen_tokens: int = field(default=0)
    roles: list[Role] | None = field(default=None)
    prefix_projection: bool = field(default=False)
    encoder_hidden_size: int | None = field(default=None)
    keep_projection: bool = field(default=False)
    embedding_only: bool = field(default=False)
    prefix_dropout: float = field(default=0.0)
    prefix_init: PrefixInit = field(default="real_tokens")
    prefix_init_text: str | None = field(default=None)
    prefix_init_token_ids: list[int] | None = field(default=None)
    prefix_init_path: str | None = field(default=None)
    prefix_init_seed: int = field(default=0)
    projection_init: ProjectionInit = field(default="least_squares")
    tokenizer_name_or_path: str | None = field(default=None)
    sliding_window: SlidingWindow = field(default="pin")
    offset_positions: bool | None = field(default=None)
    placement: Placement = field(default="prefix")
    infix_separator_token_id: int | None = field(default=None)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    trainable_token_indices: None = field(default=None)
    attention_modules: dict[str, AttentionModule] | None = field(default=None)
    initialized: bool = field(default=False)
    format_version: int | None = field(default=None)
    base_fingerprint: BaseFingerprint | None = field(default=None)
    weights_sha256: str | None = field(default=None)
    allow_other_base: bool = field(default=False)

    def __post_init__(self) -> None:
        self._check_version()
        self._check_types(PeftConfig)
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise PrefixError(f"task_type must be one of {[task.value for task in TaskType]}, got {self.task_type!r}.")
        super().__post_init__()
        self.peft_type = PrefixPeftType.HF_PREFIX
        # No field, because it is no option and is never saved.
        self._weights_follow = False
        self._check_length()
        self.check_frozen_tokens()
        self._check_choices()
        self._check_projection()
        self._check_embedding_only()
        self._check_placement()
        self._check_initialization()
        self._check_targets()
        self._check_types(PrefixConfig)
        self._check_noted()

    @property
    def hidden_size(self) -> int:
        """Hidden width of the projection."""
        return self.encoder_hidden_size or DEFAULT_HIDDEN_SIZE

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> "PrefixConfig":
        """Read the configuration of a saved prefix, and check the weights that PEFT is going to load beside it.

        `PeftModel.from_pretrained` and `load_adapter` call this before they load any weights.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            subfolder: Folder in it.
            **kwargs: Options of the download, or `allow_other_base`.

        Raises:
            PrefixFileError: The configuration or the weights are malformed, pickled, or of a later format.
            PrefixMismatchError: The two do not agree.
        """
        finish_interrupted(Path(pretrained_model_name_or_path, subfolder or ""))
        config: PrefixConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        download, _, _ = cls._split_kwargs(kwargs)
        weights = find_weights(pretrained_model_name_or_path, subfolder, **download)
        if weights is not None:
            # Whatever the file says: otherwise a prefix whose weights are refused could be used as a new one.
            config.initialized = True
            config.check_weights(weights)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the values of a configuration.

        Args:
            path_json_file: The file.
            **kwargs: Not used, as in PEFT.

        Raises:
            PrefixFileError: It is malformed, or of another method than prefix-tuning.
        """
        options = read_configuration(Path(path_json_file))
        if options.get("peft_type") != PrefixPeftType.HF_PREFIX.value:
            raise PrefixFileError(
                f"{path_json_file} is of a {options.get('peft_type')!r} adapter, not of a prefix; read it with "
                "PeftConfig.from_pretrained."
            )
        if "allow_other_base" in options:
            raise PrefixFileError(f"{path_json_file} sets allow_other_base, which only whoever loads a prefix may do.")
        return options

    def check_weights(self, file: str | Path) -> None:
        """Check that a file of weights is the one that belongs to this configuration.

        Args:
            file: The file.

        Raises:
            PrefixFileError: It is damaged, or no file of safetensors.
            PrefixMismatchError: It is of another prefix.
        """
        hidden = self.hidden_size if self.prefix_projection else None
        header = read_header(Path(file))
        check_agrees(
            Path(file),
            header,
            self.num_virtual_tokens,
            self.num_frozen_tokens,
            hidden,
            self.modules_to_save or [],
        )
        if self.weights_sha256 is not None:
            check_digest(Path(file), header, self.weights_sha256)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as it is saved, with plain JSON types."""
        options: dict[str, Any] = super().to_dict()
        # Whoever loads it decides anew.
        del options["allow_other_base"]
        return options | {"peft_type": self.peft_type.value}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as `adapter_config.json`, marked as belonging to saved weights.

        PEFT calls this when it has saved the weights. Unless the folder is a training checkpoint, they are made fit to
        be shared then: the projection is folded if it is not to be kept, and the configuration says so. The model card
        is written last.

        Args:
            save_directory: Target folder, created if missing.
            **kwargs: Passed on to PEFT.

        Raises:
            PrefixError: The weights hold values that are no finite numbers, or the projection cannot be folded.
            UnsupportedCallError: The weights are pickled.
        """
        saved = copy.copy(self)
        saved.initialized, saved.format_version = True, FORMAT_VERSION
        if not self._weights_follow and saved._export(save_directory):
            saved.describe_folded()
        saved.weights_sha256 = None if self._weights_follow else saved_digest(save_directory)
        saved._write(Path(save_directory), kwargs)
        if not self._weights_follow:
            defaults = {option.name: option.default for option in fields(saved)}
            write_card(Path(save_directory), saved.to_dict(), defaults, is_checkpoint(save_directory))

    def _write(self, folder: Path, options: dict[str, Any]) -> None:
        """Write the file under its name when it is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        place = unfinished(folder)
        try:
            super().save_pretrained(place, **options)
            write_whole(folder, CONFIG_NAME, Path(place, CONFIG_NAME))
        finally:
            shutil.rmtree(place)

    @contextmanager
    def before_its_weights(self) -> Iterator[None]:
        """Let `save_pretrained` be called before the weights are in the folder; call it again when they are."""
        self._weights_follow = True
        try:
            yield
        finally:
            self._weights_follow = False

    def describe_folded(self) -> None:
        """Describe the same prefix as plain keys and values, in place."""
        self.prefix_projection, self.encoder_hidden_size, self.keep_projection = False, None, False
        self.projection_init, self.embedding_only = "least_squares", False

    def _export(self, folder: str) -> bool:
        """Make saved weights fit to be shared; return whether they are plain keys and values."""
        check_format(folder)
        keep = self.keep_projection or not self.prefix_projection
        return not is_checkpoint(folder) and export_weights(folder, self.attention_modules or {}, keep)

    def check_frozen_tokens(self) -> None:
        """Check that frozen tokens leave some to be learned, once the length is known.

        Raises:
            PrefixError: They do not.
        """
        frozen, length = self.num_frozen_tokens, self.num_virtual_tokens
        if isinstance(frozen, bool) or not isinstance(frozen, int) or frozen < 0:
            raise PrefixError(f"num_frozen_tokens must be a whole number of at least 0, got {frozen!r}.")
        if length is not None and frozen >= length:
            raise PrefixError(
                f"num_frozen_tokens={frozen} leaves nothing to learn of num_virtual_tokens={length}; freeze fewer "
                "tokens or make the prefix longer."
            )

    def _check_version(self) -> None:
        """Check the version before anything else, because a later one may mean other things by the same names."""
        version = self.format_version
        if version is None:
            return
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise PrefixFileError(f"format_version must be a whole number of at least 1, got {version!r}.")
        if version > FORMAT_VERSION:
            raise PrefixFileError(
                f"The prefix was saved in format {version}, and this release of hf_prefix reads formats up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade hf_prefix"
            )

    def _check_types(self, declaring: type) -> None:
        """Check the types of what a class declares; a JSON file may hold any."""
        for name in declaring.__annotations__:
            hint, value = declared_types(PrefixConfig)[name], getattr(self, name)
            if name != "peft_type" and not has_type(value, hint):
                raise PrefixError(f"{name} must be {hint}, got {str(value)[:200]!r}.")

    def _check_noted(self) -> None:
        if self.attention_modules is not None and not self.attention_modules:
            raise PrefixError("attention_modules names no attention module; leave it out.")
        if not -(2**63) <= self.prefix_init_seed < 2**63:
            raise PrefixError(f"prefix_init_seed must have 64 bits, got {self.prefix_init_seed}.")
        for module in self.modules_to_save or []:
            # PEFT puts them into regular expressions.
            if not re.fullmatch(r"[\w.-]+", module):
                raise PrefixError(f"modules_to_save must be names of modules, got {module[:80]!r}.")
        for name, sample in (self.base_fingerprint or {"weights": {}})["weights"].items():
            check_sample(name, sample)

    def _check_length(self) -> None:
        length = self.num_virtual_tokens
        if length is None and self.prefix_init not in ("text", "token_ids"):
            raise PrefixError(
                f"num_virtual_tokens is missing; pass the prefix length, for example num_virtual_tokens=10 "
                f"(only prefix_init='text' and 'token_ids' can do without, got {self.prefix_init!r})."
            )
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise PrefixError(f"num_virtual_tokens must be a whole number of at least 1, got {length!r}.")

    def _check_choices(self) -> None:
        if self.roles is not None:
            known = isinstance(self.roles, list) and all(role in get_args(Role) for role in self.roles)
            if not known or not self.roles:
                raise PrefixError(f"roles must be some of {list(get_args(Role))} or None, got {self.roles!r}.")
        if self.prefix_init not in get_args(PrefixInit):
            raise PrefixError(f"prefix_init must be one of {list(get_args(PrefixInit))}, got {self.prefix_init!r}.")
        if self.sliding_window not in get_args(SlidingWindow):
            raise PrefixError(f"sliding_window must be 'pin' or 'scroll', got {self.sliding_window!r}.")
        if self.sliding_window == "scroll" and self.offset_positions is False:
            raise PrefixError(
                "sliding_window='scroll' lets the prefix leave the window as a prompt would, for which real tokens "
                "must stand behind it; leave offset_positions out."
            )
        dropout = self.prefix_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise PrefixError(f"prefix_dropout must be at least 0 and less than 1, got {self.prefix_dropout!r}.")

    def _check_projection(self) -> None:
        self._check_projection_init()
        if self.keep_projection and not self.prefix_projection:
            raise PrefixError(
                "keep_projection=True has no effect without the projection; set prefix_projection=True or leave it "
                "out."
            )
        size = self.encoder_hidden_size
        if size is None:
            return
        if not self.prefix_projection:
            raise PrefixError(
                f"encoder_hidden_size={size!r} has no effect without the projection; "
                "set prefix_projection=True or leave it out."
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise PrefixError(f"encoder_hidden_size must be a whole number of at least 1, got {size!r}.")

    def _check_projection_init(self) -> None:
        if self.projection_init not in get_args(ProjectionInit):
            raise PrefixError(
                f"projection_init must be one of {list(get_args(ProjectionInit))}, got {self.projection_init!r}."
            )
        if self.projection_init == "mse" and not self.prefix_projection:
            raise PrefixError(
                "projection_init='mse' has no effect without the projection; set prefix_projection=True or leave it "
                "out."
            )
        if self.projection_init == "mse" and self.prefix_init == "random":
            raise PrefixError(
                "projection_init='mse' has no effect with prefix_init='random', which leaves the projection at its "
                "own random start; choose another prefix_init or leave it out."
            )

    def _check_embedding_only(self) -> None:
        if not self.embedding_only:
            return
        if self.prefix_projection:
            raise PrefixError(
                "embedding_only=True learns input embeddings, prefix_projection=True an MLP that gives keys and "
                "values; choose one of them."
            )
        if self.num_frozen_tokens:
            raise PrefixError(
                f"embedding_only=True computes the keys and values of all tokens from the embeddings, so that "
                f"num_frozen_tokens={self.num_frozen_tokens} would have none to keep; choose one of them."
            )
        if self.prefix_init == "prefix":
            raise PrefixError(
                "embedding_only=True cannot start from the keys and values of another prefix, which do not tell the "
                "embeddings that they come from; use prefix_init='real_tokens', 'text' or 'token_ids'."
            )
        if self.roles is not None and self.roles != ["decoder"]:
            raise PrefixError(f"embedding_only=True is for decoder-only models, got roles={self.roles!r}.")

    def _check_placement(self) -> None:
        separator = self.infix_separator_token_id
        if self.placement not in get_args(Placement):
            raise PrefixError(f"placement must be one of {list(get_args(Placement))}, got {self.placement!r}.")
        if self.placement == "prefix":
            if separator is not None:
                raise PrefixError(
                    f"infix_separator_token_id={separator!r} is only used with placement='infix', got 'prefix'."
                )
            return
        if isinstance(separator, bool) or not isinstance(separator, int) or separator < 0:
            raise PrefixError(
                f"placement='infix' needs infix_separator_token_id, the token that ends a prompt, got {separator!r}."
            )
        if self.sliding_window != "pin" or self.offset_positions is not None:
            raise PrefixError(
                "placement='infix' decides positions by itself; leave sliding_window and offset_positions out, got "
                f"{self.sliding_window!r} and {self.offset_positions!r}."
            )

    def _check_initialization(self) -> None:
        if self.tokenizer_name_or_path is not None and self.prefix_init != "text":
            raise PrefixError(
                f"tokenizer_name_or_path={self.tokenizer_name_or_path!r} is only used with prefix_init='text', "
                f"got prefix_init={self.prefix_init!r}."
            )
        sources = {
            "prefix_init_text": ("text", self.prefix_init_text),
            "prefix_init_token_ids": ("token_ids", self.prefix_init_token_ids),
            "prefix_init_path": ("prefix", self.prefix_init_path),
        }
        for name, (init, value) in sources.items():
            if self.prefix_init == init and not value:
                raise PrefixError(f"prefix_init={init!r} needs {name}, got {value!r}.")
            if self.prefix_init != init and value is not None:
                raise PrefixError(f"{name} is only used with prefix_init={init!r}, got {self.prefix_init!r}.")

    def _check_targets(self) -> None:
        if self.target_modules == "all-linear":
            raise PrefixError(
                "target_modules='all-linear' is for methods that adapt linear layers; a prefix acts in attention "
                "modules. Leave target_modules out to use all of them."
            )
        if self.trainable_token_indices is not None:
            raise PrefixError(
                "trainable_token_indices is not supported with a prefix; use modules_to_save for the embedding."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise PrefixError(
                f"layers_to_transform={self.layers_to_transform!r} has no effect beside the regular expression "
                f"target_modules={self.target_modules!r}; name the layers in the expression."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise PrefixError(f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform.")
