"""One copy of a prefix for all rows of a batch: attended to by all queries together, and put in front of no keys.

Attention modules look their attention function up by name at each call. For the length of a call without gradients, a
module is told the name of a function that attends to the real tokens as the base model does, attends to the one
prefix, and merges both. Cache, mask and keys of the module are those of the base model then.

Which modules do nothing else with keys, values and mask than to hand them to that function is found out by looking
on: a module's first call without gradients goes the usual way, with a function in between that compares.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from hf_prefix.attention.cache import CacheView
from hf_prefix.attention.handover import AttentionFunction, Handover, ObservedView
from hf_prefix.attention.masks import Extent
from hf_prefix.attention.packing import check_kept_apart
from hf_prefix.attention.partial_attention import RowGroup, attend_to_prefixes, attend_to_tokens
from hf_prefix.attention.sites import (
    AttentionSite,
    asks_for_more_than_scores,
    attention_backend,
    is_causal,
    registered_attention,
)
from hf_prefix.attention.tuner_layer import CHILD_NAME, Arguments, StackCall
from hf_prefix.errors import UnsupportedCallError

_NAME = "hf_prefix_shared_copy"
"""Name of our attention function in transformers' table."""


def pays(prefix_length: int, rows: int, prefixes: int, device: torch.device, backend: str) -> bool:
    """Whether one copy of each prefix is faster than one for each row, as measured (docs/results/shared_prefix.md).

    Args:
        prefix_length: Number of virtual tokens, of the longest prefix.
        rows: Number of rows in the batch.
        prefixes: Number of different prefixes that they have.
        device: Where they are.
        backend: The attention implementation.
    """
    return device.type == "cpu" and backend == "sdpa" and prefix_length * rows >= 640 * prefixes


class SharedCopy:
    """Lets an attention module attend to one copy of its prefix where that is possible and pays.

    Args:
        site: The attention module.
        call: What its stack tells of the present call.
        groups_like: Gives the prefixes and the rows that have them, in the dtype and on the device of a tensor.
        count_prefixes: Gives the number of different prefixes that rows have.
        is_in_front: Tells whether the prefixes are in front of all tokens and seen by all.
    """

    def __init__(
        self,
        site: AttentionSite,
        call: StackCall,
        groups_like: Callable[[Tensor], list[RowGroup]],
        count_prefixes: Callable[[], int],
        is_in_front: Callable[[], bool],
    ) -> None:
        self.is_possible = site.attends_by_scores_alone
        self.chosen: bool | None = None
        """Whether the shared copy is used where it can be; None where it pays."""
        self._call, self._groups_like = call, groups_like
        self._count_prefixes, self._is_in_front = count_prefixes, is_in_front
        self._mask_argument, self._cross_attention = site.mask_argument, site.role == "cross"
        self._stack_name = type(site.stack).__name__
        self._is_direct: dict[str, bool | None] = {}
        self._backend = ""
        self._own_config: Any = None
        self._handover: Handover | None = None
        self._awaits_attention = False

    def hook(self, attention: nn.Module) -> Iterator[Any]:
        """Register the hook that ends a call and yield its handle.

        Args:
            attention: The attention module of the site.
        """
        if self.is_possible:
            # Also where the module fails, so that it has its own configuration again.
            yield attention.register_forward_hook(self.after_attention, always_call=True)

    def begin(self, module: nn.Module, arguments: Arguments, prefix_length: int, rows: int, extent: Extent) -> bool:
        """Decide how the prefix gets into a call that begins; return whether by the shared copy.

        Args:
            module: The attention module.
            arguments: The arguments of its call by name, which the shared copy leaves as they are.
            prefix_length: Number of virtual tokens, of the longest prefix.
            rows: Number of rows in the batch.
            extent: The tokens of the call.

        Raises:
            UnsupportedCallError: The sequences of a packed row would see each other.
        """
        self._handover, self._backend = None, attention_backend(module)
        is_direct = self._is_direct.get(self._backend)
        if not self.is_possible or is_direct is False:
            return False
        # Asked first, since it is quick.
        if is_direct and not self._is_wanted(prefix_length, rows, extent.device):
            return False
        if not self._is_open_to(module, arguments, extent):
            return False
        if is_direct is None:
            self._handover = Handover(cast(AttentionFunction, registered_attention(module)))
            return False
        if not self._cross_attention:
            check_kept_apart(self._call, self._stack_name, arguments.get(self._mask_argument))
        self._awaits_attention = True
        self._rename(module)
        return True

    def observed(self, view: CacheView) -> CacheView:
        """Return the view of the cache that a module is given, noting what it returns in a call that is looked at."""
        return view if self._handover is None else ObservedView(view, self._handover)

    def look_on(self, module: nn.Module, mask: Any) -> None:
        """Come between a module and its attention function in a call that is to be looked at.

        Args:
            module: The attention module.
            mask: The mask that it is given.
        """
        if self._handover is not None:
            self._handover.mask = mask
            self._rename(module)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        """Stand in for the attention function of the module; see `_attention`.

        Raises:
            UnsupportedCallError: The module asks for something beyond scores this time.
        """
        if self._handover is not None:
            return self._handover(module, query, key, value, mask, **more)
        if asks_for_more_than_scores(more):
            raise UnsupportedCallError(
                f"{type(module).__name__} asks its attention function for {sorted(more)}, which is more than scores "
                "and a mask; call hf_prefix.set_shared_attention(model, False)."
            )
        self._awaits_attention = False
        scale, causal = more.get("scaling"), more.get("is_causal")
        causal = is_causal(module) if causal is None else causal
        tokens = attend_to_tokens(query, key, value, mask, causal and self._backend == "sdpa", scale)
        output = tokens.merged(attend_to_prefixes(query, self._groups_like(key), scale))
        return output.transpose(1, 2).contiguous(), None

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give the module its own configuration back, and see that its prefix was attended to.

        Raises:
            UnsupportedCallError: It was not.
        """
        if self._own_config is None:
            return
        module.config, self._own_config = self._own_config, None
        handover, self._handover = self._handover, None
        missed, self._awaits_attention = self._awaits_attention, False
        # There is no output where the module failed.
        if handover is not None and output is not None:
            self._is_direct[self._backend] = handover.is_direct
        if missed and output is not None:
            raise UnsupportedCallError(
                f"{type(module).__name__} did without its attention function in this call, and so without its "
                "prefix; call hf_prefix.set_shared_attention(model, False)."
            )

    def _is_wanted(self, prefix_length: int, rows: int, device: torch.device) -> bool:
        if self.chosen is None:
            return pays(prefix_length, rows, self._count_prefixes(), device, self._backend)
        return self.chosen

    def _is_open_to(self, module: nn.Module, arguments: Arguments, extent: Extent) -> bool:
        """Whether in this call real tokens and prefix can be attended to apart."""
        learns = torch.is_grad_enabled() or self._call.with_gradients or module.training
        if learns or torch.compiler.is_compiling() or torch.is_autocast_enabled(extent.device.type):
            return False
        if arguments.get("output_attentions") or not self._is_in_front() or registered_attention(module) is None:
            return False
        return self._knows_mask(module, arguments.get(self._mask_argument), extent)

    def _knows_mask(self, module: nn.Module, mask: Any, extent: Extent) -> bool:
        if attention_backend(module) != "sdpa":
            # With block masks, a static cache is refused.
            return not extent.has_empty_slots and (mask is None or isinstance(mask, BlockMask))
        if mask is not None:
            return isinstance(mask, Tensor) and mask.dim() == 4
        # SDPA's own causal mask begins at the first key, and so means these tokens only where they are all.
        alone = extent.query_length == 1 and not extent.has_empty_slots
        whole = extent.query_length == extent.key_length and not self._cross_attention
        return alone or whole or not is_causal(module)

    def _rename(self, module: nn.Module) -> None:
        """Let a module look up our attention function, until `after_attention`."""
        AttentionInterface.register(_NAME, _attention)
        self._own_config = module.config
        module.config = cast(Any, _Renamed(module.config))


class _Renamed:
    """A configuration that names our attention function, and otherwise answers as the one that it stands for."""

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, Any]:
    """Attend, as the functions in transformers' table do, for a module that carries a prefix.

    Args:
        module: The attention module.
        query: [batch, heads, query, size]
        key: [batch, kv_heads, key, size]
        value: [batch, kv_heads, key, value_size]
        attention_mask: What the model passes to its attention implementation.
        **more: What else models pass, `scaling` and `is_causal` among it.

    Returns:
        [batch, query, heads, value_size], and the weights where the module's own function returns them.
    """
    layer = cast(Any, getattr(module, CHILD_NAME))
    output, weights = cast(SharedCopy, layer.shared_copy).attend(module, query, key, value, attention_mask, **more)
    return output, weights
