"""The value that a prefix is, for one attention module: keys and values ready for use."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyValuePrefix:
    """Keys and values that stand in front of those of the real tokens.

    Compared by identity: a cache that holds a prefix recognises by it whether the prefix is still the same.

    Args:
        key: [kv_heads, num_virtual_tokens, key_head_dim]
        value: [kv_heads, num_virtual_tokens, value_head_dim]; of size 0 where the keys are the values.

    Raises:
        ValueError: The two do not agree in heads or length.
    """

    key: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        if self.key.dim() != 3 or self.value.dim() != 3 or self.key.shape[:2] != self.value.shape[:2]:
            raise ValueError(
                "A prefix has keys and values of shape [kv_heads, num_virtual_tokens, head_dim] with equal heads "
                f"and length, got {tuple(self.key.shape)} and {tuple(self.value.shape)}."
            )

    @property
    def length(self) -> int:
        """Number of virtual tokens."""
        return self.key.shape[1]

    def to(self, like: Tensor) -> "KeyValuePrefix":
        """Return the prefix in the dtype and on the device of `like`; itself where nothing changes."""
        if self.key.dtype == like.dtype and self.key.device == like.device:
            return self
        return KeyValuePrefix(self.key.to(like), self.value.to(like))

    def part(self, index: int, parts: int) -> "KeyValuePrefix":
        """Return one of the equal parts into which the heads fall, for a module that runs several times."""
        return KeyValuePrefix(self.key.chunk(parts)[index], self.value.chunk(parts)[index])

    def behind(self, length: int) -> "KeyValuePrefix":
        """Return the prefix with `length` zeros in front, which a mask has to hide."""
        pad = torch.nn.functional.pad
        return KeyValuePrefix(pad(self.key, (0, 0, length, 0)), pad(self.value, (0, 0, length, 0)))

    def in_front_of(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[prefix ; key]` and `[prefix ; value]`.

        Args:
            key: [batch, kv_heads, length, key_head_dim]
            value: [batch, kv_heads, length, value_head_dim]
        """
        prefix = self.to(key)
        batch = key.shape[0]
        keys = torch.cat([prefix.key.expand(batch, -1, -1, -1), key], dim=-2)
        if prefix.keys_are_values:
            return keys, keys
        return keys, torch.cat([prefix.value.expand(batch, -1, -1, -1), value], dim=-2)

    @property
    def keys_are_values(self) -> bool:
        """Whether one tensor serves as keys and as values, so that there are no values of their own."""
        return self.value.shape[-1] == 0

    @staticmethod
    def concatenate(prefixes: "list[KeyValuePrefix]") -> "KeyValuePrefix":
        """Return the prefixes one after the other as one."""
        if len(prefixes) == 1:
            return prefixes[0]
        return KeyValuePrefix(
            torch.cat([prefix.key for prefix in prefixes], dim=1),
            torch.cat([prefix.value for prefix in prefixes], dim=1),
        )
