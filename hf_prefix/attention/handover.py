"""What an attention module hands over to its attention function, compared with what it was given.

Only if a module hands over the very keys, values and mask that it got from its cache and its model does attending to a
prefix apart from the real tokens mean the same as putting it in front of their keys.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_prefix.attention.cache import CacheView
from hf_prefix.attention.sites import asks_for_more_than_scores

AttentionFunction = Callable[..., tuple[Tensor, Any]]


class Handover:
    """Stands in for the attention function of a module for one call and looks at what it is handed.

    Args:
        function: The attention function, which is called.
    """

    def __init__(self, function: AttentionFunction) -> None:
        self._function = function
        self._states: list[tuple[Tensor, Tensor]] = []
        self._calls = 0
        self._is_whole = True
        self.mask: Any = None
        """The mask that the module was given."""

    def note(self, keys: Tensor, values: Tensor) -> None:
        """Note what a module got from its cache."""
        self._states.append((keys, values))

    @property
    def is_direct(self) -> bool | None:
        """Whether the module called the function once, with all that it was given; None if it stored no keys."""
        return self._calls == 1 and self._is_whole if self._states else None

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        """Compare, and attend as the module would."""
        self._calls += 1
        stored = any(key is keys and value is values for keys, values in self._states)
        self._is_whole &= stored and mask is self.mask and not asks_for_more_than_scores(more)
        return self._function(module, query, key, value, mask, **more)


class ObservedView(CacheView):
    """Notes what another view returns on update.

    Args:
        view: The other view.
        handover: Where.
    """

    def __init__(self, view: Any, handover: Handover) -> None:
        # A view answers what is asked of a cache.
        super().__init__(view)
        self._handover = handover

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all that the module shall attend to."""
        keys, values = super().update(key, value, layer_idx, *args, **kwargs)
        self._handover.note(keys, values)
        return keys, values
