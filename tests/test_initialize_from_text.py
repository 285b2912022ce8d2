"""A prefix that is attached already starts from a text: exactly that text as a prompt."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import set_adapter
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from adapters import GPT2, LLAMA, attach, logits, prefix_config
from families import Family, build, tokens
from hf_prefix import PrefixError, initialize_from_text
from hf_prefix.attention.layer import PrefixLayer
from hf_prefix.prefix.key_value import KeyValuePrefix

TEXT = "w20 w30 w40 w50 w60"
IDS = [20, 30, 40, 50, 60]
OPTIONS: dict[str, Any] = {"num_virtual_tokens": 5, "prefix_init": "zero"}


def layers(model: nn.Module) -> list[PrefixLayer]:
    """Return the prefix layers of a model."""
    return [module for module in model.modules() if isinstance(module, PrefixLayer)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the word w<id> for every id of the families' vocabulary, and one word more."""
    words = {"<s>": 1, "<unk>": 3} | {f"w{token_id}": token_id for token_id in range(5, 97)} | {"foreign": 500}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("frozen", [0, 2])
def test_prefix_of_a_text_is_that_prompt(
    causal_family: Family, projection: bool, frozen: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = attach(causal_family, projection, num_frozen_tokens=frozen, **OPTIONS)
    initialize_from_text(model, TEXT, tokenizer)
    words = tokens(2, 7)
    prompt = tokenizer([TEXT, TEXT], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(input_ids=words).logits
        with model.disable_adapter():
            wanted = model(input_ids=torch.cat([prompt, words], dim=1)).logits[:, 5:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("frozen", [0, 2])
def test_encoder_decoder_prefix_is_what_it_is_when_attached_with_the_tokens(
    seq2seq_family: Family, projection: bool, frozen: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = attach(seq2seq_family, projection, num_frozen_tokens=frozen, **OPTIONS)
    initialize_from_text(model, TEXT, tokenizer)
    attached = attach(seq2seq_family, num_virtual_tokens=5, prefix_init="token_ids", prefix_init_token_ids=IDS)
    assert len(layers(model)) == sum(count for count, _, _ in seq2seq_family.shape.values())
    for found, wanted in zip(layers(model), layers(attached), strict=True):
        one, other = KeyValuePrefix(*found.encoder("default")()), KeyValuePrefix(*wanted.encoder("default")())
        torch.testing.assert_close([one.key, one.value], [other.key, other.value], atol=1e-5, rtol=0)


def test_special_tokens_are_those_of_the_text_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = attach(LLAMA, num_virtual_tokens=3, prefix_init="zero")
    initialize_from_text(model, "<s> w20 w30", tokenizer)
    attached = attach(LLAMA, num_virtual_tokens=3, prefix_init="token_ids", prefix_init_token_ids=[1, 20, 30])
    assert torch.equal(logits(model), logits(attached))


def test_mse_comes_near_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = attach(GPT2, True, projection_init="mse", **OPTIONS)
    direct, attached = attach(GPT2, **OPTIONS), attach(GPT2, True, projection_init="mse", **OPTIONS)
    initialize_from_text(model, TEXT, tokenizer)
    initialize_from_text(direct, TEXT, tokenizer)

    def error(of: nn.Module) -> float:
        with torch.no_grad():
            states = [
                [KeyValuePrefix(*m.encoder("default")()) for m in x.modules() if isinstance(m, PrefixLayer)]
                for x in (of, direct)
            ]
        return sum((one.key - other.key).square().sum().item() for one, other in zip(*states, strict=True))

    assert 0 < error(model) < 0.95 * error(attached)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_named_prefix_of_a_plain_model_with_lora_beside_it(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(LLAMA)
    lora = LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, model, "lora")
    inject_adapter_in_model(prefix_config(LLAMA, **OPTIONS), model, "prefix")
    inject_adapter_in_model(prefix_config(LLAMA, num_virtual_tokens=2), model, "other")
    set_adapter(model, ["lora", "prefix"])
    initialize_from_text(model.eval(), TEXT, tokenizer, "prefix")
    words = tokens(2, 7)
    with torch.no_grad():
        found = model(input_ids=words).logits
        set_adapter(model, "lora")
        prompt = torch.tensor([IDS]).expand(2, -1)
        wanted = model(input_ids=torch.cat([prompt, words], dim=1)).logits[:, 5:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w20 w30", r"text has 2 tokens and the prefix 'default' num_virtual_tokens=5.*num_virtual_tokens=2"),
        (f"{TEXT} w70", r"text has 6 tokens.*num_virtual_tokens=5.*shorten.*num_virtual_tokens=6"),
        ("", r"text has 0 tokens"),
        ("w20 w30 w40 w50 foreign", r"Token id 500 is outside the model's vocabulary of 97"),
    ],
)
def test_text_that_does_not_fit_is_refused_and_changes_nothing(
    text: str, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = attach(LLAMA, num_virtual_tokens=5)
    before = logits(model)
    with pytest.raises(PrefixError, match=message):
        initialize_from_text(model, text, tokenizer)
    assert torch.equal(logits(model), before)


def test_unknown_prefix_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PrefixError, match="no prefix named 'missing'"):
        initialize_from_text(attach(LLAMA, **OPTIONS), TEXT, tokenizer, "missing")
