"""A prefix of which only input embeddings are learned, the paper's embedding-only ablation (§7.2)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_prefix.errors import PrefixError, UnsupportedCallError
from hf_prefix.prefix.encoders import (
    PrefixEncoder,
    PrefixShape,
    SharedPart,
    check_loaded,
    overwrite_with_nan,
    version_of,
)
from hf_prefix.prefix.key_value import KeyValuePrefix

Run = Callable[[Tensor], Mapping[str, KeyValuePrefix]]
"""Runs a frozen model over input embeddings [P, width]; gives what attention computes of them, by module name."""


class PrefixEmbedding(SharedPart):
    """Input embeddings E of the virtual tokens: every layer's keys and values are LM(E).

    Only the P x width numbers of E are parameters. The model itself is run over them once before a forward pass,
    outside of every checkpointed region, and gradients come back through its frozen layers.

    Args:
        num_virtual_tokens: Length P of the prefix.
        width: Width of an input embedding of the model.
        run: Runs the model over them.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, num_virtual_tokens: int, width: int, run: Run, awaiting_weights: bool) -> None:
        super().__init__()
        # PyTorch's own initialisation of an embedding, as in the original code.
        self.embedding = nn.Parameter(torch.randn(num_virtual_tokens, width))
        self.awaiting_weights = awaiting_weights
        if awaiting_weights:
            overwrite_with_nan(self)
        self._run = run
        self._states: Mapping[str, KeyValuePrefix] | None = None
        self._computed_of: object = None

    @torch.no_grad()
    def initialize(self, embedding: Tensor) -> None:
        """Copy the input embeddings [P, width] of real tokens."""
        self.embedding.copy_(embedding)

    def begin_forward(self, past_length: Callable[[], int | Tensor]) -> None:
        """Run the model over the embeddings, unless this pass continues one for which that was done.

        The result is kept for as long as the tokens in a cache, which the same model computed, so that decoding
        does not repeat it at each step. A new sequence starts anew: by then the model itself, which may carry a
        LoRA, can have changed.
        """
        if torch.is_grad_enabled() or not self._is_current() or not bool(past_length() > 0):
            self.compute()

    def compute(self) -> None:
        """Run the model over the embeddings as they are now.

        Raises:
            PrefixNotLoadedError: The prefix was attached from a saved configuration and never got its weights.
        """
        # Through `forward`, which libraries that offload weights wrap.
        self._states, self._computed_of = self(), version_of(self.embedding)

    def forward(self) -> Mapping[str, KeyValuePrefix]:
        """Return what each attention module computes of the embeddings."""
        if self.awaiting_weights:
            check_loaded(self)
            self.awaiting_weights = False
        return self._run(self.embedding)

    def key_values(self, module_name: str) -> KeyValuePrefix:
        """Return the keys and values of one attention module in the present forward pass.

        Args:
            module_name: The module's name in the model.

        Raises:
            UnsupportedCallError: Reentrant gradient checkpointing asks, or a part of the model runs alone.
        """
        if self._states is None:
            raise UnsupportedCallError(
                "embedding_only=True computes the prefix where the decoder begins, but attention runs without it; "
                "call the whole model, or fold_prefix(model) first."
            )
        states = self._states[module_name]
        if states.key.requires_grad and not torch.is_grad_enabled():
            raise UnsupportedCallError(
                "Reentrant gradient checkpointing cuts gradients off from what is computed outside of a layer, and "
                "embedding_only=True computes all keys and values there; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        return states

    def _is_current(self) -> bool:
        """Whether what is kept is of the present embeddings and has no gradient history."""
        kept = self._states is not None and self._computed_of == version_of(self.embedding)
        return kept and not any(states.key.requires_grad for states in (self._states or {}).values())

    def __getstate__(self) -> dict[str, object]:
        # A copy (copy.deepcopy, pickle) has no use for a result, and one with a gradient history cannot be copied.
        return self.__dict__ | {"_states": None, "_computed_of": None}


class EmbeddedPrefix(PrefixEncoder):
    """One attention module's keys and values of an embedding-only prefix; it has no parameters of its own.

    Args:
        shape: Shape of the keys and values.
        dropout: Dropout probability on them.
        trunk: The embeddings; they hang elsewhere in the model and are only referred to here.
        module_name: The attention module's name in the model.
    """

    def __init__(self, shape: PrefixShape, dropout: float, trunk: PrefixEmbedding, module_name: str) -> None:
        super().__init__(shape, dropout, awaiting_weights=False)
        self._module_name = module_name
        # In a tuple, so that the embeddings are no child: they would be saved once per module.
        self._trunk = (trunk,)

    @property
    def trunk(self) -> PrefixEmbedding:
        """The embeddings that all attention modules share."""
        return self._trunk[0]

    def compute(self) -> KeyValuePrefix:
        """Return what the model computed of the embeddings."""
        return self.trunk.key_values(self._module_name)

    def fit(self, key: Tensor, value: Tensor) -> None:
        """Raise: keys and values do not tell the embeddings that they come from.

        Raises:
            PrefixError: Always.
        """
        raise PrefixError(
            "embedding_only=True learns input embeddings, which cannot be found from keys and values; start it from "
            "tokens or text, or call fold_prefix(model) first."
        )

    def learned(self) -> list[Tensor]:
        """Return the embeddings."""
        return [self.trunk.embedding]

    def version(self) -> list[object]:
        """Identify the present keys and values: those of one run of the model, and no other."""
        return [self.trunk.key_values(self._module_name)]
