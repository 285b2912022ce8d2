"""hotswap_prefix: another saved prefix in the same parameters, without compiling again."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch._dynamo.testing import CompileCounter

from adapters import BART, GPT2, LLAMA, WEIGHTS, attach, edited_weights, logits, prefix_config, prefix_parameters
from families import Family, build, tokens
from hf_prefix import PrefixError, PrefixFileError, PrefixMismatchError, hotswap_prefix


def saved(folder: Path, family: Family = LLAMA, seed: int = 1, **options: Any) -> str:
    """Save a prefix and return its folder."""
    attach(family, prefix_init_seed=seed, **options).save_pretrained(folder)
    return str(folder)


def loaded(folder: str, family: Family = LLAMA, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(build(family), folder, **options).eval()


@pytest.mark.parametrize("family", [LLAMA, GPT2, BART], ids=lambda family: family.name)
@pytest.mark.parametrize("options", [{}, {"num_frozen_tokens": 1}], ids=["learned", "frozen"])
def test_a_swapped_prefix_is_the_other_one(tmp_path: Path, family: Family, options: dict[str, Any]) -> None:
    first, second = (saved(tmp_path / str(seed), family, seed, **options) for seed in (1, 2))
    model = loaded(first, family)
    before = logits(model)
    hotswap_prefix(model, second)
    assert torch.equal(logits(model), logits(loaded(second, family)))
    assert (logits(model) - before).abs().max() > 0.01
    assert model.peft_config["default"].prefix_init_seed == 2
    hotswap_prefix(model, first)
    assert torch.equal(logits(model), before)


def test_a_checkpoint_with_its_projection_is_swapped(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / f"checkpoint-{seed}", seed=seed, projection=True) for seed in (1, 2))
    model = loaded(first, is_trainable=True)
    hotswap_prefix(model, second)
    assert torch.equal(logits(model), logits(loaded(second)))
    folded = saved(tmp_path / "folded", projection=True)
    with pytest.raises(PrefixMismatchError, match="saved as keys and values, and this one has a projection"):
        hotswap_prefix(model, folded)


def test_only_the_named_prefix_is_swapped(tmp_path: Path) -> None:
    first, second, third = (saved(tmp_path / str(seed), seed=seed) for seed in (1, 2, 3))
    model = loaded(first)
    model.load_adapter(second, adapter_name="other")
    hotswap_prefix(model, third, adapter_name="other")
    assert torch.equal(logits(model), logits(loaded(first)))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(loaded(third)))


def test_a_model_of_transformers_with_its_own_adapter(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    model = build(LLAMA)
    model.load_adapter(first)
    hotswap_prefix(model, second)
    assert torch.equal(logits(model), logits(loaded(second)))


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    torch._dynamo.reset()
    counter = CompileCounter()
    model = loaded(first)
    logits(model)
    compiled = torch.compile(model, backend=counter)
    words = tokens(2, 7)
    with torch.no_grad():
        before = compiled(input_ids=words).logits
        compiled(input_ids=words)
        graphs = counter.frame_count
        assert graphs > 0
        hotswap_prefix(compiled, second)
        found = compiled(input_ids=words).logits
        assert counter.frame_count == graphs
        wanted = loaded(second)(input_ids=words).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (found - before).abs().max() > 0.01
    torch._dynamo.reset()


def test_training_goes_on_as_it_was(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    model = loaded(first, is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == 4
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    model(input_ids=tokens(2, 7), labels=tokens(2, 7)).loss.backward()
    optimizer.step()
    state = copy.deepcopy([optimizer.state[parameter] for parameter in parameters])
    hotswap_prefix(model, second)
    learning = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert learning == [id(parameter) for parameter in parameters]
    for parameter, known in zip(parameters, state, strict=True):
        assert known["exp_avg"].abs().sum() > 0
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in known.items())
    frozen = loaded(first)
    hotswap_prefix(frozen, second)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_decoding_after_a_swap_uses_the_new_prefix_in_half_precision(tmp_path: Path) -> None:
    # The keys and values that decoding keeps are copies then, in the model's dtype.
    first, second = (saved(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    model = PeftModel.from_pretrained(build(LLAMA).to(torch.bfloat16), first).eval()
    logits(model)
    with torch.inference_mode():
        hotswap_prefix(model, second)
    wanted = PeftModel.from_pretrained(build(LLAMA).to(torch.bfloat16), second).eval()
    assert torch.equal(logits(model), logits(wanted))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 4}, r"num_virtual_tokens is 4 there and 3 here"),
        ({"num_frozen_tokens": 1}, r"num_frozen_tokens is 1 there and 0 here"),
        ({"sliding_window": "scroll"}, r"sliding_window is 'scroll' there and 'pin' here"),
        ({"offset_positions": False}, r"offset_positions is False there and None here"),
        ({"placement": "infix", "infix_separator_token_id": 7}, r"placement is 'infix' there and 'prefix' here"),
        ({"layers_to_transform": [1]}, r"attention_modules is .* there and .* here"),
        ({"family": GPT2}, r"attention_modules is .* there and .* here"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_another_kind_of_prefix_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    check_refused(tmp_path, saved(tmp_path / "other", **options), message)


def test_damaged_numbers_are_refused(tmp_path: Path) -> None:
    other = saved(tmp_path / "other")
    with edited_weights(Path(other)) as weights:
        # The last one, so that everything before it would have been copied.
        weights[sorted(weights)[-1]][0, 0, 0] = float("nan")
    check_refused(tmp_path, other, "holds values that are no finite numbers")


def test_a_prefix_of_another_base_is_refused(tmp_path: Path) -> None:
    base = build(LLAMA)
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    get_peft_model(base, prefix_config()).save_pretrained(tmp_path / "other")
    check_refused(tmp_path, str(tmp_path / "other"), "is for another base model. What differs: .*embed_tokens")


def test_numbers_that_would_be_rounded_are_refused(tmp_path: Path) -> None:
    other = saved(tmp_path / "other")
    with edited_weights(Path(other)) as weights:
        for name in sorted(weights)[-1:]:
            weights[name] = weights[name].double()
    check_refused(tmp_path, other, r"saved as torch.float64 and would be rounded to torch.float32")


def check_refused(tmp_path: Path, other: str, message: str) -> None:
    """Check that a swap fails and leaves everything as it was."""
    model = loaded(saved(tmp_path / "first"))
    before, numbers, config = logits(model), prefix_parameters(model), model.peft_config["default"].to_dict()
    with pytest.raises(PrefixMismatchError, match=message):
        hotswap_prefix(model, other)
    assert all(torch.equal(value, numbers[name]) for name, value in prefix_parameters(model).items())
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].to_dict() == config


def test_what_is_no_prefix_is_refused(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "first"))
    with pytest.raises(PrefixError, match=re.escape("no prefix named 'other' that could be replaced; it has ['defa")):
        hotswap_prefix(model, str(tmp_path / "first"), adapter_name="other")
    lora = get_peft_model(build(LLAMA), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PrefixError, match="no prefix named 'default'"):
        hotswap_prefix(lora, str(tmp_path / "first"))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(PrefixError, match="not a prefix"):
        hotswap_prefix(model, str(tmp_path / "lora"))
    (tmp_path / "first" / WEIGHTS).unlink()
    with pytest.raises(PrefixFileError, match="holds a configuration, but no adapter_model"):
        hotswap_prefix(model, str(tmp_path / "first"))


def test_peft_says_that_its_own_swap_is_for_lora(tmp_path: Path) -> None:
    # Its list of methods could be lengthened, but what follows reads rank and alpha of the configuration.
    first = saved(tmp_path / "first")
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA.* but HF_PREFIX was passed"):
        hotswap_adapter(loaded(first), first, adapter_name="default", torch_device="cpu")
