"""The prefixes of an attention module as its keys need them, kept between calls while nothing changes."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_prefix.attention.partial_attention import RowGroup
from hf_prefix.attention.rows import Rows
from hf_prefix.attention.sharding import may_be_gathered
from hf_prefix.prefix.encoders import PrefixEncoder
from hf_prefix.prefix.key_value import KeyValuePrefix


class PreparedPrefixes:
    """The prefixes that are active in one attention module.

    Without gradients they are prepared once and kept until a parameter changes, so that decoding does not evaluate the
    MLP, nor cast anything, at each step. Among several processes nothing is kept.

    Args:
        encoders: Gives the active prefixes by name.
        mixed_rows: Gives the prefix of each row; None where all rows have the same.
        learns: Tells whether the present call is one with gradients. The first run of reentrant checkpointing is,
            though gradients are off in it: it asks the shared trunk as its second run will.
    """

    def __init__(
        self,
        encoders: Callable[[], dict[str, PrefixEncoder]],
        mixed_rows: Callable[[], Rows | None],
        learns: Callable[[], bool],
    ) -> None:
        self._encoders, self._mixed_rows, self._learns = encoders, mixed_rows, learns
        self._joined: tuple[object, KeyValuePrefix] | None = None
        self._groups: tuple[object, list[RowGroup]] | None = None

    def forget(self) -> None:
        """Prepare everything anew when it is asked for next."""
        self._joined = self._groups = None

    def like(self, like: Tensor) -> KeyValuePrefix:
        """Return the prefixes, one after the other, or those of the rows, as `like` in dtype and device."""
        if not self._may_keep():
            return self._join(like)
        state = self._state(like)
        if self._joined is None or self._joined[0] != state:
            self._joined = (state, self._join(like))
        return self._joined[1]

    def groups_like(self, like: Tensor) -> list[RowGroup]:
        """Return the different prefixes, each with the rows that have it, as `like` in dtype and device."""
        rows = self._mixed_rows()
        if rows is None:
            return [RowGroup(None, self.like(like))]
        if not self._may_keep():
            return self._group(rows, like)
        state = self._state(like)
        if self._groups is None or self._groups[0] != state:
            self._groups = (state, self._group(rows, like))
        return self._groups[1]

    def _may_keep(self) -> bool:
        encoders = self._encoders().values()
        drops_out = any(encoder.training and encoder.dropout > 0 for encoder in encoders)
        return not (self._learns() or torch.compiler.is_compiling() or drops_out or may_be_gathered())

    def _state(self, like: Tensor) -> object:
        """Return what the prepared prefixes depend on."""
        versions = [encoder.version() for encoder in self._encoders().values()]
        return like.dtype, like.device, self._mixed_rows(), versions

    def _join(self, like: Tensor) -> KeyValuePrefix:
        rows, encoders = self._mixed_rows(), self._encoders()
        if rows is None:
            return KeyValuePrefix.concatenate([_computed(encoder) for encoder in encoders.values()]).to(like)
        prefixes = {name: _computed(encoder).to(like) for name, encoder in encoders.items()}
        return KeyValuePrefix.per_row([prefixes.get(name) for name in rows])

    def _group(self, rows: Rows, like: Tensor) -> list[RowGroup]:
        indices = {name: [row for row, has in enumerate(rows) if has == name] for name in self._encoders()}
        return [
            RowGroup(torch.tensor(indices[name], device=like.device), _computed(encoder).to(like))
            for name, encoder in self._encoders().items()
        ]


def _computed(encoder: PrefixEncoder) -> KeyValuePrefix:
    return KeyValuePrefix(*encoder())
