"""Which attention modules of a model a configuration means, and whether they can be met."""

import warnings
from dataclasses import replace

from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel

from hf_prefix.attention.sites import AttentionSite
from hf_prefix.config import PrefixConfig, Role
from hf_prefix.errors import PrefixError, PrefixFileError, PrefixMismatchError, UnsupportedModelError
from hf_prefix.sharing.folding import AttentionModule


def select_sites(sites: list[AttentionSite], config: PrefixConfig, model: PreTrainedModel) -> list[AttentionSite]:
    """Return the sites whose role a configuration asks for.

    Raises:
        UnsupportedModelError: The model has no attention of a role that is asked for.
    """
    present: list[Role] = list(dict.fromkeys(site.role for site in sites))
    roles = config.roles or present
    absent = [role for role in roles if role not in present]
    if absent:
        raise UnsupportedModelError(
            f"roles={config.roles} asks for {absent} attention, but {type(model).__name__} has only {present}."
        )
    if config.roles is None and model.config.is_encoder_decoder and "encoder" not in present:
        warnings.warn(
            f"The encoder of {type(model).__name__} carries no prefix, because it attends within windows or blocks of "
            f"its own making, or to what is no text; the prefix acts in {present} attention only. Set roles={present} "
            "to say that this is meant.",
            stacklevel=2,
        )
    return [site for site in sites if site.role in roles]


def use_noted_modules(config: PrefixConfig) -> None:
    """Let a saved configuration name the modules that it notes, in place of the patterns by which they were found.

    A regular expression that someone else wrote can run forever, so none that comes with a folder is run.

    Raises:
        PrefixFileError: It has patterns and notes no modules.
    """
    patterns = config.target_modules, config.exclude_modules, config.layers_to_transform, config.layers_pattern
    if not config.initialized or all(pattern is None for pattern in patterns):
        return
    if config.attention_modules is not None:
        config.target_modules = sorted(config.attention_modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    elif any(isinstance(pattern, str) for pattern in patterns):
        raise PrefixFileError(
            f"The saved prefix chooses its modules by regular expressions, {patterns}, and does not note which they "
            "were. Nobody else's are run here, since they could take forever; write the names of the modules into "
            "target_modules of its adapter_config.json."
        )


def matching_names(sites: list[AttentionSite], config: PrefixConfig) -> PrefixConfig:
    """Return the configuration with target_modules filled in, for PEFT's own rules of naming modules."""
    if config.target_modules is not None:
        return config
    # The last part of the names, because PEFT looks at layers_to_transform only where a suffix matches.
    return replace(config, target_modules=sorted({site.name.rpartition(".")[2] for site in sites}))


def check_layers(matcher: PrefixConfig, sites: list[AttentionSite]) -> None:
    """Check that every layer that is asked for exists; PEFT leaves out unknown ones without a word.

    Args:
        matcher: What `matching_names` returned.
        sites: All sites of the roles asked for.

    Raises:
        PrefixError: A layer does not exist.
    """
    wanted = matcher.layers_to_transform
    for layer in [wanted] if isinstance(wanted, int) else wanted or []:
        only = replace(matcher, layers_to_transform=[layer], exclude_modules=None)
        if not any(check_target_module_exists(only, site.name) for site in sites):
            raise PrefixError(
                f"layers_to_transform={wanted!r} asks for layer {layer}, but no attention module of the model is in a "
                f"layer of that number; the modules are {[site.name for site in sites]}."
            )


def note_modules(config: PrefixConfig, targets: list[AttentionSite]) -> None:
    """Note in a configuration which modules get the prefix; check that a saved prefix is attached to the same ones.

    Raises:
        PrefixMismatchError: It is not.
    """
    found = {site.name: _noted(site) for site in targets}
    noted = config.attention_modules
    if config.initialized and noted is not None and noted != found:
        differing = sorted(name for name in noted.keys() | found.keys() if noted.get(name) != found.get(name))
        first = differing[0]
        raise PrefixMismatchError(
            f"The saved prefix is for another model: {len(differing)} attention modules differ; {first} was "
            f"{noted.get(first)} there and is {found.get(first)} here. Load it on the base model that its "
            "adapter_config.json names."
        )
    config.attention_modules = found


def _noted(site: AttentionSite) -> AttentionModule:
    return AttentionModule(role=site.role, kv_heads=site.heads, key_size=site.key_size, value_size=site.value_size)


def moves_positions(config: PrefixConfig, site: AttentionSite, model: PreTrainedModel) -> bool:
    """Whether real tokens stand behind the prefix in the site's stack.

    Raises:
        UnsupportedModelError: `offset_positions` asks for what the model's positions do not allow.
    """
    if site.role != "decoder":
        return False
    if site.has_relative_positions:
        if config.offset_positions is False:
            raise UnsupportedModelError(
                f"{type(model).__name__} has relative positions, and a prefix always stands before the sequence; "
                "leave offset_positions out."
            )
        return False
    if not site.one_decoder:
        if config.offset_positions:
            raise UnsupportedModelError(
                f"{type(model).__name__} has several decoders that count positions of different things; leave "
                "offset_positions out."
            )
        return False
    return not model.config.is_encoder_decoder if config.offset_positions is None else config.offset_positions
