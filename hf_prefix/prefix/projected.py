"""The paper's MLP (§4.3) as a parameterisation: a trunk that all attention modules of a role share, and slices."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_prefix.prefix.encoders import PrefixEncoder, PrefixShape, SharedPart, check_loaded, overwrite_with_nan
from hf_prefix.prefix.key_value import KeyValuePrefix
from hf_prefix.prefix.projection import hidden_layer, output_layer


class PrefixTrunk(SharedPart):
    """The part of the paper's MLP that all attention modules of a role share: H = tanh(E W^T + b).

    Args:
        num_learned_tokens: Length P of the prefix, without its frozen tokens.
        model_size: Width of the embedding E, the model's hidden size.
        hidden_size: Width of H.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, num_learned_tokens: int, model_size: int, hidden_size: int, awaiting_weights: bool) -> None:
        super().__init__()
        # PyTorch's own initialisation of an embedding and a linear layer, as in the original code.
        linear = nn.Linear(model_size, hidden_size)
        self.embedding = nn.Parameter(torch.randn(num_learned_tokens, model_size))
        self.weight, self.bias = linear.weight, linear.bias
        self.awaiting_weights = awaiting_weights
        if awaiting_weights:
            overwrite_with_nan(self)
        self._began_with_gradients = False
        # By whether the forward pass began with gradients: H, and who evaluated it.
        self._results: dict[bool, tuple[Tensor, int]] = {}

    def begin_forward(self, past_length: Callable[[], int | Tensor]) -> None:
        """Forget the result of the last forward pass that began as this one does, with or without gradients.

        One without gradients may come between a forward pass and its backward pass, which still needs the other
        result under gradient checkpointing: DPO asks the reference model there. Whether the pass continues an
        earlier one does not matter.
        """
        self._began_with_gradients = torch.is_grad_enabled()
        self._results.pop(self._began_with_gradients, None)

    def hidden(self, caller: int) -> Tensor:
        """Return H [num_learned_tokens, hidden_size], evaluated once per forward pass.

        Under gradient checkpointing a layer runs twice. The caller that evaluated H evaluates it again then, so
        that both runs do the same. In reentrant checkpointing the first run records no gradient, so that its H
        is useless to the second run, and each caller evaluates its own.

        Args:
            caller: Identifies the attention module that asks.
        """
        with_gradients = torch.is_grad_enabled()
        # What runs with gradients belongs to a pass that began so; the first run of reentrant checkpointing, too.
        forward_pass = with_gradients or self._began_with_gradients
        if forward_pass not in self._results:
            self._results[forward_pass] = (self(), caller)
            return self._results[forward_pass][0]
        known, evaluated_by = self._results[forward_pass]
        usable = known.requires_grad or not with_gradients
        if usable and evaluated_by != caller:
            return known
        anew: Tensor = self()
        return anew

    def forward(self) -> Tensor:
        """Return H, in float32 whatever the autocast.

        Raises:
            PrefixNotLoadedError: The prefix was attached from a saved configuration and never got its weights.
        """
        if self.awaiting_weights:
            check_loaded(self)
            self.awaiting_weights = False
        return hidden_layer(self.embedding, self.weight, self.bias)

    def __getstate__(self) -> dict[str, object]:
        # A copy (copy.deepcopy, pickle) has no use for a result, and one with a gradient history cannot be copied.
        return self.__dict__ | {"_results": {}}


class ProjectedPrefix(PrefixEncoder):
    """One attention module's slice of the MLP's output layer: [K ; V] = H W^T + b.

    Row-splitting the paper's output layer changes nothing, and lets modules differ in shape.

    Args:
        shape: Shape of the keys and values.
        dropout: Dropout probability on them.
        trunk: The shared part; it hangs elsewhere in the model and is only referred to here.
        awaiting_weights: Whether the weights come from a file.
    """

    def __init__(self, shape: PrefixShape, dropout: float, trunk: PrefixTrunk, awaiting_weights: bool) -> None:
        super().__init__(shape, dropout, awaiting_weights)
        linear = nn.Linear(trunk.weight.shape[0], shape.heads * (shape.key_size + shape.value_size))
        self.weight, self.bias = linear.weight, linear.bias
        if awaiting_weights:
            overwrite_with_nan(self)
        # In a tuple, so that the trunk is no child: its parameters would be saved once per module.
        self._trunk = (trunk,)

    @property
    def trunk(self) -> PrefixTrunk:
        """The shared part of the MLP."""
        return self._trunk[0]

    def compute(self) -> KeyValuePrefix:
        """Return this module's slice."""
        hidden = self.trunk.hidden(caller=id(self)).to(self.weight.device)
        return output_layer(hidden, self.weight, self.bias, self.shape.heads, self.shape.key_size)

    @torch.no_grad()
    def fit(self, key: Tensor, value: Tensor) -> None:
        """Solve the slice by least squares: exact while the learned tokens are at most as many as the hidden width.

        The bias is the mean over the tokens, and the weights are the ones of least norm.

        Args:
            key: [heads, num_learned_tokens, key_size]
            value: [heads, num_learned_tokens, value_size]
        """
        hidden = self.trunk()
        if hidden.shape[0] > hidden.shape[1]:
            warnings.warn(
                f"The {hidden.shape[0]} learned virtual tokens exceed encoder_hidden_size={hidden.shape[1]}, so the "
                "prefix starts only near its initialisation; a larger encoder_hidden_size makes it exact.",
                stacklevel=2,
            )
        target = as_rows(key, value).to(hidden.device, torch.float64)
        bias = target.mean(dim=0)
        weight = torch.linalg.pinv(hidden.double()) @ (target - bias)
        self.weight.copy_(weight.T)
        self.bias.copy_(bias)

    def learned(self) -> list[Tensor]:
        """Return slice and trunk."""
        return [self.weight, self.bias, *self.trunk.parameters()]


def as_rows(key: Tensor, value: Tensor) -> Tensor:
    """Return [heads, tokens, size] of keys and values as [tokens, heads * (key_size + value_size)]."""
    return torch.cat([key.transpose(0, 1).flatten(1), value.transpose(0, 1).flatten(1)], dim=1)
