"""Refuses continuous batching up front, where the caller still sees the error."""

from typing import Any

from transformers import PreTrainedModel

from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.errors import UnsupportedCallError

_METHOD = "init_continuous_batching"


class ContinuousBatchingGuard:
    """Stands on a model in place of the method that every way into continuous batching calls first.

    transformers 5.17 to 5.24 run the model in a thread of their own there and turn what it raises into requests
    marked as failed, which is easily overlooked. They offer no hook before that thread, so the method is covered on
    the one model that carries a prefix; `remove` uncovers it. While no prefix is active, the method runs as ever.

    Args:
        model: The model that `generate_batch` is called on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        if hasattr(model, _METHOD):
            setattr(model, _METHOD, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the covered method does, unless a prefix is active.

        Raises:
            UnsupportedCallError: A prefix is active.
        """
        if any(isinstance(module, PrefixLayer) and module.length > 0 for module in self._model.modules()):
            raise UnsupportedCallError(
                "Continuous batching (generate_batch, cache_implementation='paged') keeps keys and values in pages "
                "that the prefix cannot be put in front of; call generate with another cache, or disable the prefix."
            )
        return getattr(type(self._model), _METHOD)(self._model, *args, **kwargs)

    def remove(self) -> None:
        """Uncover the method."""
        vars(self._model).pop(_METHOD, None)
