"""Which parameters are the top of a model: its last layers and the normalisation behind them."""

from torch import nn
from transformers import PreTrainedModel

from hf_prefix.errors import UnsupportedModelError


def train_top_layers(model: PreTrainedModel, number: int) -> None:
    """Make the last layers of a decoder-only model, and the normalisation behind them, the only trainable parameters.

    In the original code that is `h.22`, `h.23` and `ln_f` of GPT-2 medium; the output layer, which shares its weights
    with the input embeddings, stays as it is.

    Args:
        model: The model.
        number: How many layers.

    Raises:
        UnsupportedModelError: The decoder has not one list of at least so many layers.
    """
    decoder = model.get_decoder()
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == depth]
    if len(lists) != 1 or not 1 <= number <= len(lists[0]):
        raise UnsupportedModelError(
            f"The top {number} layers of {type(model).__name__} cannot be told: its {type(decoder).__name__} has "
            f"{len(lists)} lists of {depth} layers. Choose another method, or fewer layers."
        )
    model.requires_grad_(False)
    for module in [*lists[0][-number:], *_final_norms(decoder)]:
        module.requires_grad_(True)


def _final_norms(decoder: nn.Module) -> list[nn.Module]:
    """Return the normalisations beside the layers, but for those of the embeddings."""
    return [
        child
        for name, child in decoder.named_children()
        if "norm" in type(child).__name__.lower() and "embed" not in name
    ]
