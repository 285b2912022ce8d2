"""What a conversion has to know of a base model: names, shapes and order of its attention modules, not its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from hf_prefix.config import PrefixConfig, Role
from hf_prefix.errors import PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.sharing.fingerprint import BaseFingerprint, differences
from hf_prefix.sharing.folding import AttentionModule
from hf_prefix.sharing.saved_prefix import SavedPrefix


@dataclass(frozen=True)
class BaseSite:
    """An attention module of a base model.

    Args:
        name: Its name in the model.
        module: Its role and sizes.
        layer: Its place in the model's cache of keys and values; in an encoder, which has none, its number there.
        window: How many positions it sees, its own included, if it has a sliding window.
    """

    name: str
    module: AttentionModule
    layer: int
    window: int | None


@dataclass(frozen=True)
class BaseLayout:
    """The attention of a base model.

    Args:
        name: Folder or Hub id of the model.
        is_encoder_decoder: Whether it has an encoder.
        has_relative_positions: Whether its decoder is told distances of tokens and not their positions.
        sites: Every attention module that can carry a prefix.
        fingerprint: What a prefix depends on in the model.
        cache_differs: Whether its cache does not give the logits of a plain forward pass, with or without a prefix.
    """

    name: str | None
    is_encoder_decoder: bool
    has_relative_positions: bool
    sites: tuple[BaseSite, ...]
    fingerprint: BaseFingerprint
    cache_differs: bool = False

    def of_role(self, role: Role) -> list[BaseSite]:
        """Return the attention modules of a role by layer."""
        return sorted((site for site in self.sites if site.module["role"] == role), key=lambda site: site.layer)

    def new_prefix(self, key_values: Mapping[str, KeyValuePrefix], source: str, **options: Any) -> SavedPrefix:
        """Return a prefix for this model.

        Args:
            key_values: Keys and values by name of the attention module.
            source: Where they were read, for the error.
            **options: Fields of its configuration that are not the defaults.

        Raises:
            PrefixMismatchError: They are for attention of other shapes.
        """
        noted = {site.name: site.module for site in self.sites if site.name in key_values}
        for name, prefix in key_values.items():
            self._check_shape(noted[name], prefix, name, source)
        present = {module["role"] for module in noted.values()}
        roles = [role for role in get_args(Role) if role in present]
        complete = sum(site.module["role"] in present for site in self.sites) == len(noted)
        counts = {role: self.fingerprint["sites"][role] for role in roles}
        fingerprint: BaseFingerprint = {**self.fingerprint, "sites": counts}
        config = PrefixConfig(
            task_type="SEQ_2_SEQ_LM" if self.is_encoder_decoder else "CAUSAL_LM",
            base_model_name_or_path=self.name,
            inference_mode=True,
            num_virtual_tokens=next(iter(key_values.values())).length,
            roles=None if present == self.fingerprint["sites"].keys() else roles,
            target_modules=None if complete else list(noted),
            attention_modules=noted,
            base_fingerprint=fingerprint,
            **options,
        )
        return SavedPrefix(config, key_values)

    def check_fits(self, prefix: SavedPrefix) -> None:
        """Check that a saved prefix is for this model.

        Raises:
            PrefixMismatchError: It is not; the error shows what differs.
        """
        here = {site.name: site.module for site in self.sites}
        lines = [
            f"{name}: {dict(module)} there, {here.get(name)} here"
            for name, module in prefix.attention_modules.items()
            if here.get(name) != module
        ]
        saved = prefix.config.base_fingerprint
        if saved is not None:
            lines += differences(saved, {**self.fingerprint, "sites": saved["sites"]})
        if lines:
            raise PrefixMismatchError(
                f"The prefix is for another base model than {self.name or 'this one'}. What differs: "
                f"{'; '.join(lines)}. Give its own base model."
            )

    def _check_shape(self, module: AttentionModule, prefix: KeyValuePrefix, name: str, source: str) -> None:
        expected = module["kv_heads"], module["key_size"], module["value_size"]
        found = prefix.key.shape[0], prefix.key.shape[2], prefix.value.shape[2]
        if found != expected:
            raise PrefixMismatchError(
                f"The prefix in {source} is for another base model: for {name} it has (kv_heads, key size, value "
                f"size) = {found}, and {self.name or 'the base model'} has {expected}. Give its own base model."
            )
