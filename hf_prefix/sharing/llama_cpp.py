"""The slot files of a llama.cpp server, in which a prefix takes the place of a prompt's keys and values.

`POST /slots/0?action=save` writes one (`llama_state_seq_save_file`), little-endian:

    magic, version, number of token words, token words            u32 each
    number of streams, then for each stream:
      number of cells; position, number of sequences, sequences   u32 each, per cell
      whether values are transposed, number of layers             u32 each
      per layer: type u32, bytes of a row u64, keys [cells, heads x size]
      per layer: type u32, bytes of a row u64, values [cells, heads x size]
        or:      type u32, bytes of a number u32, numbers of a row u32, values [heads x size, cells]

Releases differ in what stands around the tokens and in front of the keys. So nothing is written from a description:
the server saves a template, keys and values are found in it by their headers, and all else stays as the server wrote
it. Source: `src/llama-context.cpp` and `src/llama-kv-cache.cpp` of
https://github.com/ggml-org/llama.cpp, and the files of builds 8672 and 11549 (2026).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prefix.errors import PrefixError, PrefixFileError, PrefixMismatchError
from hf_prefix.prefix.key_value import KeyValuePrefix

Shape = tuple[int, int, int]
"""Heads, tokens and size of a head."""

_MAGIC = b"qsgg"
"""The u32 0x67677371."""

_MARKER = 0xFFFFFFFF
"""No token: where the list of tokens starts with it, its first words are others."""

_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""By ggml's number of the type."""

_QUANTISED = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 20: 18}
"""Bytes of 32 numbers, by ggml's number of the types that a cache can have."""

_SEARCHED = 4096
"""Bytes behind the tokens in which the cells are looked for; there is one word for each slot of the server."""

_UNKNOWN = 8
"""Words in front of the keys that may be there and are left as they are; a release of 2026 writes two."""


@dataclass(frozen=True)
class _Block:
    """Where the keys or the values of a layer are."""

    start: int
    shape: Shape
    dtype: torch.dtype
    transposed: bool

    @property
    def end(self) -> int:
        heads, length, size = self.shape
        return self.start + heads * length * size * self.dtype.itemsize

    def read(self, data: bytes) -> Tensor:
        """Return the numbers [heads, tokens, size], float32."""
        heads, length, size = self.shape
        flat = torch.frombuffer(bytearray(data[self.start : self.end]), dtype=self.dtype).float()
        if self.transposed:
            return flat.view(heads, size, length).transpose(1, 2)
        return flat.view(length, heads, size).transpose(0, 1)

    def write(self, data: bytearray, numbers: Tensor) -> None:
        """Put numbers [heads, tokens, size] in their place."""
        cast = numbers.detach().cpu().to(self.dtype)
        if not bool(torch.isfinite(cast).all()):
            raise PrefixError(
                f"The prefix has numbers up to {float(numbers.abs().max()):.3g}, which the server's cache of "
                f"{self.dtype} cannot hold. Start it with --cache-type-k f32 --cache-type-v f32 and save the template "
                "again."
            )
        ordered = cast.transpose(1, 2) if self.transposed else cast.transpose(0, 1)
        data[self.start : self.end] = ordered.contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, eq=False)
class SlotTemplate:
    """A slot file as a server saved it, with the places of its keys and values.

    Args:
        data: The file.
        token_ids: The tokens of the prompt that the server had processed.
        keys: Places of the keys, by layer.
        values: Places of the values, by layer.
    """

    data: bytes
    token_ids: list[int]
    keys: list[_Block]
    values: list[_Block]

    @classmethod
    def parse(cls, data: bytes, shapes: Sequence[Shape]) -> "SlotTemplate":
        """Find keys and values in a slot file.

        Args:
            data: The file.
            shapes: Heads, tokens and size of a head of each layer, as the prefix has them; equal for keys and values.

        Raises:
            PrefixFileError: It is no slot file, it ends too early or too late, or its form is not understood.
            PrefixMismatchError: It is of another number of tokens or layers, or of other sizes.
        """
        length = shapes[0][1]
        words, at = _token_words(data)
        at = _cells_end(data, at, length, len(words))
        transposed, layers = _words(data, at, 2)
        if transposed > 1 or layers != len(shapes):
            raise PrefixMismatchError(
                f"The template has {layers} layers of keys and values and the prefix {len(shapes)}; the server must "
                "run the base model of the prefix, without sliding windows or recurrent layers."
            )
        keys, at = _keys(data, at + 8, shapes)
        values, at = _values(data, at, shapes, bool(transposed))
        _check_rest(data, at)
        return cls(data, _token_ids(words, length), keys, values)

    def key_values(self) -> list[KeyValuePrefix]:
        """Return the keys and values of the prompt by layer, float32; the keys in the order of the server's model."""
        return [
            KeyValuePrefix(key.read(self.data), value.read(self.data))
            for key, value in zip(self.keys, self.values, strict=True)
        ]

    def filled(self, prefix: Sequence[KeyValuePrefix]) -> bytes:
        """Return the file with other keys and values.

        Args:
            prefix: Keys and values by layer, of the shapes of the template; the keys in its order.

        Raises:
            PrefixError: The server's cache cannot hold their numbers.
        """
        data = bytearray(self.data)
        for key, value, new in zip(self.keys, self.values, prefix, strict=True):
            key.write(data, new.key)
            value.write(data, new.value)
        return bytes(data)


def in_pairs(key: Tensor) -> Tensor:
    """Return keys with the two numbers that are rotated together side by side.

    transformers rotates the numbers i and i + size / 2 of a head. GGUF files of Llama and its kin have the rows of
    their projections reordered, so that these are the numbers 2i and 2i + 1. Attention is the same, since queries are
    reordered, too.

    Args:
        key: [..., size], of even size.
    """
    halves = key.reshape(*key.shape[:-1], 2, key.shape[-1] // 2)
    return halves.transpose(-1, -2).reshape(key.shape)


def _words(data: bytes, at: int, count: int) -> tuple[int, ...]:
    if at + 4 * count > len(data):
        raise PrefixFileError(
            f"The template ends after {len(data)} bytes, in the middle of what it announces. Let the server save it "
            "again (POST /slots/0?action=save)."
        )
    return struct.unpack_from(f"<{count}I", data, at)


def _token_words(data: bytes) -> tuple[tuple[int, ...], int]:
    """Return the words with the tokens, and where they end."""
    if data[:4] != _MAGIC:
        raise PrefixFileError(
            f"The template starts with {data[:4]!r} and is no slot file of a llama.cpp server. Let the server save "
            "one (POST /slots/0?action=save)."
        )
    (count,) = _words(data, 8, 1)
    return _words(data, 12, count), 12 + 4 * count


def _token_ids(words: tuple[int, ...], length: int) -> list[int]:
    """Return the tokens; since 2026 they stand behind a marker, a version and their number, and images behind them."""
    if len(words) == length:
        return list(words)
    if words[:1] == (_MARKER,) and words[2:3] == (length,) and len(words) > 2 + length:
        return list(words[3 : 3 + length])
    raise PrefixFileError(
        f"The template does not tell its {length} tokens in a form that is understood: {words[:8]}... Templates of "
        "text prompts can be used, of images not."
    )


def _cells_end(data: bytes, start: int, length: int, words: int) -> int:
    """Return where the list of cells ends."""
    for at in range(start, min(start + _SEARCHED, len(data) - 12), 4):
        if _words(data, at, 1)[0] == length and (end := _matching_cells(data, at + 4, length)) is not None:
            return end
    raise PrefixMismatchError(
        f"The template does not hold {length} tokens at the positions 0 to {length - 1}, as the prefix has; its list "
        f"of tokens has {words} words. Let the server process a prompt of exactly {length} tokens and no more "
        "(n_predict 0) before it saves the slot."
    )


def _matching_cells(data: bytes, at: int, length: int) -> int | None:
    """Return where cells at the positions 0, 1, ... of one sequence end that start here, or None."""
    # A cell names its sequence, which is the slot's number; older releases leave that out.
    for sequences in (_words(data, at + 8, 1) if at + 12 <= len(data) else (), ()):
        form = f"<{2 + len(sequences)}I"
        cells = b"".join(struct.pack(form, position, len(sequences), *sequences) for position in range(length))
        if data.startswith(cells, at):
            return at + len(cells)
    return None


def _keys(data: bytes, at: int, shapes: Sequence[Shape]) -> tuple[list[_Block], int]:
    """Return the keys by layer, and where they end."""
    for start in range(at, at + 4 * _UNKNOWN + 4, 4):
        if _row(data, start, shapes[0]) is not None:
            return _rows(data, start, shapes, "keys")
    for start in range(at, at + 4 * _UNKNOWN + 4, 4):
        _check_not_quantised(data, start, shapes[0])
    raise PrefixMismatchError(_other_sizes(data, at, shapes[0], "keys"))


def _values(data: bytes, at: int, shapes: Sequence[Shape], transposed: bool) -> tuple[list[_Block], int]:
    """Return the values by layer, and where they end."""
    if not transposed:
        return _rows(data, at, shapes, "values")
    blocks = []
    for heads, length, size in shapes:
        kind, itemsize, numbers = _words(data, at, 3)
        dtype = _DTYPES.get(kind)
        if dtype is None or dtype.itemsize != itemsize or numbers != heads * size:
            raise PrefixMismatchError(_other_sizes(data, at, (heads, length, size), "values"))
        blocks.append(_block(data, at + 12, (heads, length, size), dtype, transposed=True))
        at = blocks[-1].end
    return blocks, at


def _rows(data: bytes, at: int, shapes: Sequence[Shape], what: str) -> tuple[list[_Block], int]:
    blocks = []
    for shape in shapes:
        dtype = _row(data, at, shape)
        if dtype is None:
            _check_not_quantised(data, at, shape)
            raise PrefixMismatchError(_other_sizes(data, at, shape, what))
        blocks.append(_block(data, at + 12, shape, dtype, transposed=False))
        at = blocks[-1].end
    return blocks, at


def _row(data: bytes, at: int, shape: Shape) -> torch.dtype | None:
    """Return the dtype of rows of this shape whose header is here, or None."""
    kind, low, high = _words(data, at, 3)
    dtype = _DTYPES.get(kind)
    fits = dtype is not None and (low, high) == (shape[0] * shape[2] * dtype.itemsize, 0)
    return dtype if fits else None


def _block(data: bytes, start: int, shape: Shape, dtype: torch.dtype, transposed: bool) -> _Block:
    block = _Block(start, shape, dtype, transposed)
    _words(data, block.end, 0)
    return block


def _check_not_quantised(data: bytes, at: int, shape: Shape) -> None:
    kind, low, high = _words(data, at, 3)
    if kind in _QUANTISED and (low, high) == (shape[0] * shape[2] // 32 * _QUANTISED[kind], 0):
        raise PrefixFileError(
            "The template has quantised keys or values, into which a prefix cannot be put exactly. Start the server "
            "with --cache-type-k f16 --cache-type-v f16 (or f32) and save the template again."
        )


def _other_sizes(data: bytes, at: int, shape: Shape, what: str) -> str:
    heads, _, size = shape
    return (
        f"The template has no {what} of {heads} heads of size {size} in float32, float16 or bfloat16 at byte {at}, "
        f"where the prefix needs them; it has {_words(data, at, 3)} there. The server must run the base model of the "
        "prefix; latent attention and recurrent layers have no such keys and values."
    )


def _check_rest(data: bytes, at: int) -> None:
    """Check that nothing follows but the zeros that stand for the server's other slots."""
    rest = data[at:]
    if len(rest) > _SEARCHED or len(rest) % 4 or any(rest):
        raise PrefixFileError(
            f"The template has {len(rest)} bytes behind its keys and values that are not understood. A prefix cannot "
            "be put into the slot of a model with sliding windows or recurrent layers, or with a draft model."
        )
