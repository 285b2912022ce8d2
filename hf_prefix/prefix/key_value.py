"""The value that a prefix is, for one attention module: keys and values ready for use."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyValuePrefix:
    """Keys and values that stand in front of those of the real tokens.

    Compared by identity: a cache that holds a prefix recognises by it whether the prefix is still the same.

    Args:
        key: [(row,) kv_heads, num_virtual_tokens, key_head_dim]; with rows where each has a prefix of its own.
        value: [(row,) kv_heads, num_virtual_tokens, value_head_dim]; of size 0 where the keys are the values.

    Raises:
        ValueError: The two do not agree in rows, heads or length.
    """

    key: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        if self.key.dim() not in (3, 4) or self.key.shape[:-1] != self.value.shape[:-1]:
            raise ValueError(
                "A prefix has keys and values of shape [(row,) kv_heads, num_virtual_tokens, head_dim] with equal "
                f"rows, heads and length, got {tuple(self.key.shape)} and {tuple(self.value.shape)}."
            )

    @property
    def length(self) -> int:
        """Number of virtual tokens."""
        return self.key.shape[-2]

    def to(self, like: Tensor) -> "KeyValuePrefix":
        """Return the prefix in the dtype and on the device of `like`; itself where nothing changes."""
        if self.key.dtype == like.dtype and self.key.device == like.device:
            return self
        return KeyValuePrefix(self.key.to(like), self.value.to(like))

    def part(self, index: int, parts: int) -> "KeyValuePrefix":
        """Return one of the equal parts into which the heads fall, for a module that runs several times."""
        return KeyValuePrefix(self.key.chunk(parts, dim=-3)[index], self.value.chunk(parts, dim=-3)[index])

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
    def per_row(prefixes: "list[KeyValuePrefix | None]") -> "KeyValuePrefix":
        """Return a prefix for each row [row, kv_heads, longest, head_dim].

        Shorter ones, and the rows that have none, are filled up with zeros in front, which a mask has to hide. So
        every prefix ends where the tokens begin, as it does alone.

        Args:
            prefixes: The prefix of each row, None for a row without any; at least one is one. The same object may
                stand for several rows.
        """
        different = list({id(prefix): prefix for prefix in prefixes if prefix is not None}.values())
        longest = max(prefix.length for prefix in different)
        places = {id(prefix): place for place, prefix in enumerate(different)}
        places[id(None)] = len(different)
        filled = [prefix.behind(longest - prefix.length) for prefix in different]
        filled.append(KeyValuePrefix(torch.zeros_like(filled[0].key), torch.zeros_like(filled[0].value)))
        rows = torch.tensor([places[id(prefix)] for prefix in prefixes], device=filled[0].key.device)
        return KeyValuePrefix(
            torch.stack([prefix.key for prefix in filled]).index_select(0, rows),
            torch.stack([prefix.value for prefix in filled]).index_select(0, rows),
        )

    @staticmethod
    def concatenate(prefixes: "list[KeyValuePrefix]") -> "KeyValuePrefix":
        """Return the prefixes one after the other as one."""
        if len(prefixes) == 1:
            return prefixes[0]
        return KeyValuePrefix(
            torch.cat([prefix.key for prefix in prefixes], dim=1),
            torch.cat([prefix.value for prefix in prefixes], dim=1),
        )
