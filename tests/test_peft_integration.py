"""PEFT's own operations on a prefix: several of them, switching, removing, copying, restricting."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import zoo
from adapters import (
    BART,
    GPT2,
    LLAMA,
    T5,
    attach,
    forward,
    hook_count,
    logits,
    loss,
    one_step,
    prefix_config,
    prefix_parameters,
)
from families import Family, build
from hf_prefix import PrefixError, UnsupportedCallError, UnsupportedModelError
from hf_prefix.attention.positions import positions_module


def test_attaching_keeps_names_and_values_of_the_base_model(family: Family, projection: bool) -> None:
    base = build(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    get_peft_model(base, prefix_config(family, projection))
    after = {name: tensor for name, tensor in base.state_dict().items() if "hf_prefix" not in name}
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(base.state_dict()) > len(before)


def test_only_the_prefix_is_trained_and_the_base_stays_as_it_is(family: Family, projection: bool) -> None:
    model = attach(family, projection).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    one_step(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(prefix_parameters(model))


def test_disabled_prefix_is_the_base_model(family: Family, projection: bool) -> None:
    model = attach(family, projection)
    expected = logits(build(family))
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_unload_gives_the_base_model_back(family: Family, projection: bool) -> None:
    base = build(family)
    names, modules, hooks = list(base.state_dict()), len(list(base.modules())), hook_count(base)
    model = get_peft_model(base, prefix_config(family, projection)).eval()
    model.add_adapter("other", prefix_config(family, projection, num_virtual_tokens=2))
    logits(model)
    unloaded = model.unload()
    assert unloaded is base
    assert (list(base.state_dict()), len(list(base.modules())), hook_count(base)) == (names, modules, hooks)
    assert torch.equal(logits(base), logits(build(family)))


def test_merging_is_refused() -> None:
    model = attach(LLAMA)
    with pytest.raises(UnsupportedCallError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(UnsupportedCallError, match="cannot be merged"):
        model.merge_adapter()


@pytest.fixture(params=[LLAMA, GPT2, BART, T5], ids=lambda family: family.name)
def some_family(request: pytest.FixtureRequest) -> Family:
    """Families that differ in how they keep positions and caches."""
    return request.param


OTHER = {"num_virtual_tokens": 2, "prefix_init_seed": 9}


def attach_two(family: Family, projection: bool) -> PeftModel:
    """Return a model with the prefixes "default" and "other"; the first is active."""
    model = attach(family, projection)
    model.add_adapter("other", prefix_config(family, projection, **OTHER))
    return model.eval()


def test_each_of_several_prefixes_acts_as_it_does_alone(some_family: Family, projection: bool) -> None:
    first, second = (logits(attach(some_family, projection, **options)) for options in ({}, OTHER))
    model = attach_two(some_family, projection)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_only_the_active_prefix_is_trained(some_family: Family, projection: bool) -> None:
    model = attach_two(some_family, projection).train()
    model.set_adapter("other")
    before = prefix_parameters(model)
    one_step(model)
    after = prefix_parameters(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".other" in name for name in changed)
    assert changed == {name for name in before if ".other" in name}


def test_deleted_prefix_leaves_nothing_behind(some_family: Family, projection: bool) -> None:
    model = attach_two(some_family, projection)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(attach(some_family, projection, **OTHER)))
    assert not any(".default" in name for name in prefix_parameters(model))
    assert list(model.peft_config) == ["other"]
    model.add_adapter("default", prefix_config(some_family, projection))
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(attach(some_family, projection)))


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
def test_deleting_the_active_prefix_activates_the_other(some_family: Family, projection: bool) -> None:
    model = attach_two(some_family, projection)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(attach(some_family, projection, **OTHER)))


def test_loaded_prefix_joins_the_others(some_family: Family, projection: bool, tmp_path: Path) -> None:
    source = attach(some_family, projection, **OTHER)
    source.save_pretrained(tmp_path)
    model = attach(some_family, projection)
    expected = logits(model)
    model.load_adapter(tmp_path, "loaded")
    assert torch.equal(logits(model.eval()), expected)
    model.set_adapter("loaded")
    assert torch.equal(logits(model), logits(source))


def test_several_prefixes_are_saved_to_folders_of_their_own(projection: bool, tmp_path: Path) -> None:
    model = attach_two(LLAMA, projection)
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "other").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_second_prefix_starts_from_the_base_model_alone(some_family: Family) -> None:
    options = {"prefix_init": "token_ids", "prefix_init_token_ids": [8, 9, 10]}
    model = attach(some_family)
    model.add_adapter("other", prefix_config(some_family, **options))
    model.set_adapter("other")
    assert torch.equal(logits(model.eval()), logits(attach(some_family, **options)))


def concatenated(family: Family, first: PeftModel, second: PeftModel) -> PeftModel:
    """Return a model with one direct prefix: the first's keys and values, then the second's."""
    states = [get_peft_model_state_dict(model) for model in (first, second)]
    length = sum(model.peft_config["default"].num_virtual_tokens for model in (first, second))
    model = attach(family, num_virtual_tokens=length)
    joined = {name: torch.cat([state[name] for state in states], dim=1) for name in states[0]}
    set_peft_model_state_dict(model, joined)
    return model


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]], ids="-".join)
def test_active_prefixes_act_as_their_concatenation(some_family: Family, order: list[str]) -> None:
    alone = {"default": attach(some_family), "other": attach(some_family, **OTHER)}
    model = attach_two(some_family, projection=False)
    model.base_model.set_adapter(order)
    expected = logits(concatenated(some_family, *(alone[name] for name in order)))
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), logits(alone["default"]), atol=1e-3)


def test_active_projections_are_trained_together(some_family: Family) -> None:
    model = attach_two(some_family, projection=True).train()
    model.base_model.set_adapter(["default", "other"])
    loss(model).backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if "hf_prefix" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []


def test_copy_is_independent_and_gives_the_same_outputs(some_family: Family, projection: bool) -> None:
    model = attach(some_family, projection)
    loss(model.train()).backward()
    expected = logits(model.eval())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    one_step(twin.train())
    assert not torch.equal(logits(twin.eval()), expected)
    assert torch.equal(logits(model), expected)
    before = logits(twin)
    one_step(model.train())
    assert torch.equal(logits(twin), before)
    unloaded = twin.unload()
    assert hook_count(unloaded) == hook_count(build(some_family))
    assert torch.equal(logits(unloaded), logits(build(some_family)))
    assert not torch.equal(logits(model.eval()), logits(unloaded))


def test_copy_without_a_forward_pass(projection: bool) -> None:
    model = attach(LLAMA, projection)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_parameter_counts_are_the_papers(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    stored = sum(2 * 3 * count * heads * size for count, heads, size in family.shape.values())
    model = attach(family)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_nb_trainable_parameters() == (stored, total)
    model.print_trainable_parameters()
    assert f"trainable params: {stored:,} || all params: {total:,}" in capsys.readouterr().out


def test_projection_counts_are_the_papers(family: Family) -> None:
    # §4.3 per role: an embedding P x d, one hidden layer of width m, and an output for all keys and values.
    length, width, hidden = 3, 32, 8
    expected = 0
    for count, heads, size in family.shape.values():
        outputs = 2 * count * heads * size
        expected += length * width + width * hidden + hidden + outputs * hidden + outputs
    assert attach(family, projection=True).get_nb_trainable_parameters()[0] == expected


def test_status_reports_know_the_prefix(some_family: Family, projection: bool) -> None:
    model = attach_two(some_family, projection)
    status = model.get_model_status()
    assert status.peft_types == {"default": "HF_PREFIX", "other": "HF_PREFIX"}
    assert status.active_adapters == ["default"]
    assert sorted(status.available_adapters) == ["default", "other"]
    assert status.enabled is True
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert all(layer.enabled for layer in model.get_layer_status())


def prefixed_modules(model: PeftModel) -> set[str]:
    """Return the attention modules with parameters of a prefix."""
    return {
        name.removeprefix("base_model.model.").partition(".hf_prefix.")[0]
        for name in prefix_parameters(model)
        if "hf_prefix_encoder" in name
    }


SUBSETS: list[tuple[Family, dict[str, Any], set[str]]] = [
    (LLAMA, {"layers_to_transform": [1]}, {"model.layers.1.self_attn"}),
    (LLAMA, {"layers_to_transform": 0, "layers_pattern": "layers"}, {"model.layers.0.self_attn"}),
    (LLAMA, {"target_modules": ["layers.0.self_attn"]}, {"model.layers.0.self_attn"}),
    (LLAMA, {"target_modules": r"model\.layers\.1\..*"}, {"model.layers.1.self_attn"}),
    (LLAMA, {"exclude_modules": ["layers.0.self_attn"]}, {"model.layers.1.self_attn"}),
    (LLAMA, {"exclude_modules": r".*\.1\..*"}, {"model.layers.0.self_attn"}),
    (GPT2, {"layers_to_transform": [1]}, {"transformer.h.1.attn"}),
    (
        BART,
        {"target_modules": ["encoder_attn"]},
        {"model.decoder.layers.0.encoder_attn", "model.decoder.layers.1.encoder_attn"},
    ),
    (
        BART,
        {"layers_to_transform": [0], "roles": ["encoder", "decoder"]},
        {"model.encoder.layers.0.self_attn", "model.decoder.layers.0.self_attn"},
    ),
    (
        BART,
        {"exclude_modules": ["self_attn"]},
        {"model.decoder.layers.0.encoder_attn", "model.decoder.layers.1.encoder_attn"},
    ),
    (
        T5,
        {"layers_to_transform": [2]},
        {"encoder.block.2.layer.0.SelfAttention"},
    ),
    (
        T5,
        {"layers_to_transform": [0]},
        {
            "encoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.1.EncDecAttention",
        },
    ),
]


@pytest.mark.parametrize(
    ("family", "options", "modules"), SUBSETS, ids=[f"{family.name}-{options}" for family, options, _ in SUBSETS]
)
def test_prefix_acts_only_where_it_is_asked_for(
    family: Family, options: dict[str, Any], modules: set[str], projection: bool, tmp_path: Path
) -> None:
    model = attach(family, projection, **options)
    assert prefixed_modules(model) == modules
    assert not torch.equal(logits(model), logits(build(family)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    loss(model.train()).backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["mlp"]}, r"\['mlp'\] not found"),
        ({"exclude_modules": ["self_attn"]}, r"No modules were targeted.*exclude_modules"),
    ],
)
def test_restriction_that_leaves_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(LLAMA, **options)


@pytest.mark.parametrize("layers", [[0, 7], [7], 7], ids=str)
def test_layer_that_the_model_does_not_have_is_refused(layers: list[int] | int) -> None:
    with pytest.raises(PrefixError, match=r"layers_to_transform.*7"):
        attach(LLAMA, layers_to_transform=layers)


def test_role_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"roles.*'cross'.*LlamaForCausalLM has only \['decoder'\]"):
        attach(LLAMA, roles=["decoder", "cross"])


def record_outputs(modules: dict[str, nn.Module], model: nn.Module) -> dict[str, Tensor]:
    """Return the first output of each module in one forward pass."""
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: outputs.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
        for name, module in modules.items()
    ]
    forward(model)
    for handle in handles:
        handle.remove()
    return outputs


def watched_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder's first attention modules, and the encoder's last layer."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if hasattr(base, "decoder"):
        block = base.decoder.block[0].layer
        return {
            "encoder": base.encoder.block[-1],
            "decoder": block[0].SelfAttention,
            "cross": block[1].EncDecAttention,
        }
    layer = base.model.decoder.layers[0]
    return {"encoder": base.model.encoder.layers[-1], "decoder": layer.self_attn, "cross": layer.encoder_attn}


@pytest.mark.parametrize(
    ("role", "changed"),
    [
        # Whatever comes before the prefix in the computation keeps its bits; what it feeds changes.
        ("encoder", {"encoder", "cross"}),
        ("decoder", {"decoder", "cross"}),
        ("cross", {"cross"}),
    ],
)
def test_each_role_acts_where_it_says(seq2seq_family: Family, role: str, changed: set[str], projection: bool) -> None:
    model, base = attach(seq2seq_family, projection, roles=[role]), build(seq2seq_family)
    with_prefix = record_outputs(watched_modules(model), model)
    without = record_outputs(watched_modules(base), base)
    assert {name for name in without if not torch.equal(with_prefix[name], without[name])} == changed
    count, _, _ = seq2seq_family.shape[role]
    assert len(prefixed_modules(model)) == count
    assert not torch.equal(logits(model), logits(base))


def test_layers_before_the_first_prefixed_one_are_untouched(family: Family) -> None:
    offset_positions = None if family.is_encoder_decoder else False
    model = attach(family, layers_to_transform=[1], offset_positions=offset_positions)
    kind = "decoder_hidden_states" if family.is_encoder_decoder else "hidden_states"
    with_prefix = forward(model, output_hidden_states=True)[kind]
    without = forward(build(family), output_hidden_states=True)[kind]
    if not family.is_encoder_decoder:
        assert torch.equal(with_prefix[1], without[1])
    assert not torch.equal(with_prefix[2], without[2])


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("index", [0, 1])
def test_t5_layers_without_prefix_get_the_relative_bias_of_the_base(stack: str, index: int, backend: str) -> None:
    """A layer without prefix computes what the base model computes from the same input."""
    model = get_peft_model(build(T5, backend), prefix_config(T5, layers_to_transform=[index], roles=[stack])).eval()
    base = build(T5, backend)
    block = 1 - index
    given: list[Tensor] = []
    name = f"{stack}.block.{block}"
    handle = (
        model.get_base_model()
        .get_submodule(name)
        .register_forward_pre_hook(lambda module, args: given.append(args[0]))
    )
    produced = record_outputs({"block": model.get_base_model().get_submodule(name)}, model)["block"]
    handle.remove()
    base.get_submodule(name).register_forward_pre_hook(lambda module, args: (given[0], *args[1:]))
    assert torch.allclose(record_outputs({"block": base.get_submodule(name)}, base)["block"], produced, atol=1e-6)


def test_dropout_acts_in_training_only(some_family: Family, projection: bool) -> None:
    model = attach(some_family, projection, prefix_dropout=0.5)
    assert torch.equal(logits(model), logits(attach(some_family, projection)))
    for module in model.modules():
        # Ours alone, since the base model's own dropout would hide whether ours acts.
        if type(module).__module__.startswith("hf_prefix"):
            module.training = True
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.eval()), logits(attach(some_family, projection)))


def test_attaching_leaves_the_global_random_numbers_alone(family: Family, projection: bool) -> None:
    for init in ("random", "real_tokens", "zero"):
        base = build(family)
        before = torch.get_rng_state()
        get_peft_model(base, prefix_config(family, projection, prefix_init=init))
        assert torch.equal(torch.get_rng_state(), before), init


def test_model_without_attention_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*no attention module"):
        get_peft_model(transformers.MambaForCausalLM(config), prefix_config())


def test_module_that_is_not_of_transformers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="models of transformers, got Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), prefix_config())


def test_refused_model_keeps_its_outputs(family: Family) -> None:
    base = build(family)
    names, hooks = list(base.state_dict()), hook_count(base)
    with pytest.raises(PrefixError, match="2 tokens but has num_virtual_tokens=1"):
        get_peft_model(
            base,
            prefix_config(family, num_virtual_tokens=1, prefix_init="token_ids", prefix_init_token_ids=[7, 8]),
        )
    assert (list(base.state_dict()), hook_count(base)) == (names, hooks)
    assert torch.equal(logits(base), logits(build(family)))


def test_model_that_cannot_move_its_positions_is_refused_whole() -> None:
    entry = next(entry for entry in zoo.entries() if entry.model_type == "blt")
    base = zoo.build(entry)
    names, modules, hooks = list(base.state_dict()), len(list(base.modules())), hook_count(base)
    with pytest.raises(
        UnsupportedModelError, match=r"BltForCausalLM has several decoders.*leave offset_positions out"
    ):
        get_peft_model(base, prefix_config(LLAMA, offset_positions=True))
    assert (list(base.state_dict()), len(list(base.modules())), hook_count(base)) == (names, modules, hooks)
    assert torch.equal(logits(base), logits(zoo.build(entry)))


def test_a_stack_without_positions_of_its_own_says_so() -> None:
    stack = build(T5).get_encoder()
    with pytest.raises(UnsupportedModelError, match=r"T5Stack takes no position_ids.*offset_positions=False"):
        positions_module(stack)
