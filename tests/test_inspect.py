"""What `hf-prefix inspect` tells is what the folder holds: facts, norms, nearest tokens, heatmaps, JSON."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from adapters import BART, GPT2, KEPT, LLAMA, attach, edit_config, edited_weights, prefix_config
from command_line import ROWS, error_of, run, train_on, usage_error_of, write_rows
from families import build
from hf_prefix import PrefixConfig, PrefixError, PrefixFileError, UnsupportedModelError, fold_prefix
from hf_prefix.inspection import heatmaps
from hf_prefix.inspection.attention_mass import measure_attention_mass
from hf_prefix.inspection.heatmaps import draw_prefix, plot_prefix
from hf_prefix.inspection.inputs import encode_text
from hf_prefix.inspection.layers import in_layer_order, layer_labels
from hf_prefix.inspection.nearest_tokens import find_nearest_tokens, vocabulary_embeddings
from hf_prefix.inspection.summary import read_embeddings, summarize
from tiny_model import save_with_tokenizer, tiny_bart, tiny_gpt2

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder-only model with a tokenizer."""
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("gpt2"), pad=False)


@pytest.fixture(scope="module")
def trained(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix folder that `train` wrote."""
    folder = tmp_path_factory.mktemp("trained") / "prefix"
    data = write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS)
    assert train_on(gpt2, data, folder, "--prompt-template", "<{source}>").exit_code == 0
    return folder


@pytest.fixture(scope="module")
def embedded(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding-only prefix that starts as the tokens 40, 50 and 60."""
    folder = tmp_path_factory.mktemp("embedded")
    start = {"prefix_init": "token_ids", "prefix_init_token_ids": [40, 50, 60]}
    config = PrefixConfig(task_type="CAUSAL_LM", embedding_only=True, **start)
    get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), config).save_pretrained(folder)
    return folder


def told(*arguments: object) -> str:
    """Return what `inspect` prints, on one line."""
    result = run("inspect", *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def told_as_json(*arguments: object) -> dict[str, Any]:
    """Return what `inspect --json` prints."""
    result = run("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


# Facts


def test_a_prefix_that_the_command_line_trained(trained: Path, gpt2: Path):
    flat = told(trained)
    # 2 layers, keys and values of 4 heads, 3 virtual tokens, 8 numbers.
    assert "parameters: 384 bytes: 1,536" in flat
    assert "virtual tokens: 3" in flat
    assert f"base model: {gpt2} architecture: gpt2 task: CAUSAL_LM" in flat
    assert "sites: 2 decoder" in flat
    assert "saved as: export licence: unknown" in flat
    assert "2 │ transformer.h.*.attn: key │ [4, 3, 8]" in flat
    assert "trained on: 4 pairs of `pairs.jsonl` amount: 3 steps, seed 0" in flat
    assert "(cross-entropy in nats per target token, last step of the training)" in flat


def test_embeddings_are_what_is_learned(embedded: Path):
    flat = told(embedded)
    assert "projection: none (input embeddings)" in flat
    assert "parameters: 96 " in flat
    assert "norm of input embeddings: " in flat
    assert "norm of keys" not in flat


def test_frozen_tokens_are_stored_and_not_learned(gpt2: Path, tmp_path: Path):
    config = PrefixConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_frozen_tokens=1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), config).save_pretrained(tmp_path)
    flat = told(tmp_path)
    assert "virtual tokens: 3 frozen tokens: 1" in flat
    assert "parameters: 256 bytes: 1,536 frozen numbers: 128" in flat
    assert "2 │ transformer.h.*.attn: frozen_key │ [4, 1, 8]" in flat
    # Norms are of all tokens.
    assert [len(norms.key) for norms in summarize(tmp_path).norms.values()] == [3, 3]


def test_parts_of_the_model_and_further_options(tmp_path: Path):
    attach(BART, roles=["decoder", "cross"], layers_to_transform=[1], prefix_dropout=0.1).save_pretrained(tmp_path)
    flat = told(tmp_path)
    assert "sites: 1 of 2 decoder, 1 of 2 cross" in flat
    assert "options: " in flat
    assert "roles=['decoder', 'cross']" in flat
    assert "prefix_dropout=0.1" in flat


def test_a_checkpoint_with_its_projection(tmp_path: Path):
    attach(LLAMA, projection=True).save_pretrained(tmp_path / "checkpoint-3")
    flat = told(tmp_path / "checkpoint-3")
    assert "projection: hidden width 8" in flat
    assert "saved as: training checkpoint" in flat


def test_modules_that_were_trained_beside_the_prefix(tmp_path: Path):
    attach(GPT2, modules_to_save=["ln_f"]).save_pretrained(tmp_path)
    assert "other numbers: 64 of trained modules of the base model" in told(tmp_path)
    assert summarize(tmp_path).sizes.parameters == 2 * 2 * 4 * 3 * 8


def test_the_card_of_the_folder(tmp_path: Path):
    attach(LLAMA).save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: mit"))
    assert "licence: mit tags: hf_prefix" in told(tmp_path).replace("transformers, ", "")
    card.unlink()
    assert "licence" not in told(tmp_path)
    assert summarize(tmp_path).card is None


def test_a_prefix_whose_training_diverged_can_be_looked_at(tmp_path: Path):
    attach(LLAMA).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        name = next(iter(weights))
        weights[name][:, 1] = torch.nan
    assert "damaged: holds values that are no finite numbers" in told(tmp_path)
    found = told_as_json(tmp_path)
    assert not found["is_finite"]
    norms = [numbers for one in found["norms"].values() for numbers in one.values()]
    assert sorted(None in numbers for numbers in norms) == [False, False, False, True]
    assert "its training diverged" in error_of(run("inspect", tmp_path, "--plot", tmp_path / "picture.png"))


def test_weights_that_do_not_go_with_the_configuration_are_refused(tmp_path: Path):
    attach(LLAMA).save_pretrained(tmp_path)
    with edited_weights(tmp_path) as weights:
        for name in list(weights):
            weights[name.replace("encoder", "other")] = weights.pop(name)
    with pytest.raises(PrefixError, match=r"hold none of what adapter_config.json says \(prefix_projection=False"):
        summarize(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(PrefixFileError, match=r"holds a configuration, but no adapter_model\.safetensors"):
        summarize(tmp_path)


def test_the_base_model_is_not_needed(trained: Path, tmp_path: Path):
    moved = shutil.copytree(trained, tmp_path / "moved")
    edit_config(moved, base_model_name_or_path="someone/gone")
    (moved / "training.json").unlink()
    assert "base model: someone/gone" in told(moved, "--plot", tmp_path / "picture.png")


def test_json_tells_the_same_facts(trained: Path, gpt2: Path):
    found = told_as_json(trained)
    assert found["form"] == "keys and values"
    assert found["base_model"] == str(gpt2)
    assert found["sizes"] == {"parameters": 384, "frozen": 0, "other": 0, "bytes": 1536}
    assert found["attention_modules"]["transformer.h.1.attn"]["kv_heads"] == 4
    assert found["tensors"][0] == {
        "name": "transformer.h.*.attn: key", "count": 2, "shape": [4, 3, 8], "dtype": "float32"
    }  # fmt: skip
    assert found["card"]["library_name"] == "peft"
    assert found["training"]["amount"] == "3 steps, seed 0"
    assert found["norms"] == json.loads(json.dumps(summarize(trained).as_json()["norms"]))
    assert found["attention_mass"] is found["nearest_tokens"] is None


# Norms


@pytest.mark.parametrize("options", [{}, {"projection": True}, KEPT, {"num_frozen_tokens": 1}], ids=str)
@torch.no_grad()
def test_norms_are_those_of_what_the_model_attends_to(options: dict[str, bool], tmp_path: Path):
    model = attach(LLAMA, **options)
    model.save_pretrained(tmp_path)
    fold_prefix(model)
    norms = summarize(tmp_path).norms
    assert len(norms) == 2
    for name, found in norms.items():
        prefix = model.get_base_model().get_submodule(name).hf_prefix.hf_prefix_encoder["default"]()
        for got, states in ((found.key, prefix[0]), (found.value, prefix[1])):
            wanted = [
                sum(float(states[head, token].square().sum()) ** 0.5 for head in range(2)) / 2 for token in range(3)
            ]
            assert got == pytest.approx(wanted, rel=1e-5)


def test_norms_of_embeddings(embedded: Path):
    found = summarize(embedded)
    assert found.norms == {}
    assert found.embedding_norms == pytest.approx(read_embeddings(embedded).square().sum(dim=-1).sqrt().tolist())


def test_layers_are_in_their_order(tmp_path: Path):
    config = build(LLAMA).config
    config.num_hidden_layers, config.layer_types = 11, None
    get_peft_model(LlamaForCausalLM(config), prefix_config()).save_pretrained(tmp_path)
    names = summarize(tmp_path).names_of("decoder")
    assert list(layer_labels(names).values()) == [str(layer) for layer in range(11)]


def test_names_that_a_number_does_not_tell_apart_stay_whole():
    assert layer_labels(["a.0.x", "a.0.y"]) == {"a.0.x": "a.0.x", "a.0.y": "a.0.y"}
    assert layer_labels(["attention"]) == {"attention": "attention"}
    assert in_layer_order(["b.10.x", "b.2.x", "a.3"]) == ["a.3", "b.2.x", "b.10.x"]


# Nearest tokens


def test_tokens_that_a_prefix_starts_from_are_nearest(embedded: Path, gpt2: Path):
    vocabulary = vocabulary_embeddings(AutoModelForCausalLM.from_pretrained(gpt2))
    found = find_nearest_tokens(read_embeddings(embedded), vocabulary, 4)
    assert found.token_ids[:, 0].tolist() == [40, 50, 60]
    assert found.similarity[:, 0].tolist() == pytest.approx([1, 1, 1])
    for row, embedding in enumerate(read_embeddings(embedded)):
        cosines = [float(embedding @ other / embedding.norm() / other.norm()) for other in vocabulary]
        best = sorted(range(len(cosines)), key=lambda token: -cosines[token])[:4]
        assert found.token_ids[row].tolist() == best
        assert found.similarity[row].tolist() == pytest.approx([cosines[token] for token in best], abs=1e-6)


def test_nearest_tokens_are_told_with_their_texts(embedded: Path):
    (first, second, *_), *_ = told_as_json(embedded, "--nearest-tokens", 3)["nearest_tokens"]
    # Of one token per byte, the first three are special.
    assert first["id"] == 40
    assert first["cosine"] == pytest.approx(1)
    assert second["cosine"] < 1
    assert f"{first['token']!r} (1.00)" in told(embedded, "--nearest-tokens", 1)


def test_keys_and_values_have_no_nearest_tokens(trained: Path, tmp_path: Path):
    message = error_of(run("inspect", trained, "--nearest-tokens", 3))
    assert "holds the keys and values of a prefix, and no input embeddings that could be compared" in message
    attach(LLAMA, **KEPT).save_pretrained(tmp_path)
    with pytest.raises(PrefixError, match="holds a prefix with its projection, and no input embeddings"):
        read_embeddings(tmp_path)


def test_vocabularies_that_do_not_fit_are_refused():
    with pytest.raises(PrefixError, match="of width 3 and the vocabulary of width 4; pass the base model"):
        find_nearest_tokens(torch.ones(2, 3), torch.ones(5, 4))
    with pytest.raises(PrefixError, match="has 4 tokens; ask for 1 to so many, got 5"):
        find_nearest_tokens(torch.ones(2, 3), torch.ones(4, 3))
    model = build(LLAMA)
    model.set_input_embeddings(torch.nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="embeddings up in Linear, which is no plain table"):
        vocabulary_embeddings(model)


# Attention mass


def test_a_text_is_measured_as_training_encoded_it(trained: Path, gpt2: Path):
    found = told_as_json(trained, "--text", "name : Aromi", "--target", "Aromi.")["attention_mass"]
    base = AutoModelForCausalLM.from_pretrained(gpt2, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, trained)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    # Two brackets of the template, and the end token.
    inputs = encode_text(base, tokenizer, "name : Aromi", "Aromi.", prompt_template="<{source}>")
    assert inputs["input_ids"].shape == (1, len("<name : Aromi>Aromi.") + 1)
    assert found == measure_attention_mass(model, [inputs]).as_json()
    flat = told(trained, "--text", "name : Aromi")
    assert "│ decoder │ 1 │" in flat
    assert "│ 14 │" in flat


def test_an_encoder_decoder_is_measured_with_another_base_model(tmp_path: Path):
    base = save_with_tokenizer(tiny_bart(), tmp_path / "bart")
    config = PrefixConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    get_peft_model(tiny_bart(), config).save_pretrained(tmp_path / "prefix")
    assert "does not name its base model" in error_of(run("inspect", tmp_path / "prefix", "--text", "tea"))
    found = told_as_json(tmp_path / "prefix", "--text", "tea", "--model", base)["attention_mass"]
    assert {one["role"]: one["queries"] for one in found.values()} == {"encoder": 3, "decoder": 1, "cross": 1}


def test_options_that_would_be_ignored_are_refused(trained: Path):
    assert "--target follows a --text; give both" in usage_error_of(run("inspect", trained, "--target", "x"))
    message = usage_error_of(run("inspect", trained, "--model", "gpt2"))
    assert "the base model is needed for --text and --nearest-tokens only" in message


# Heatmaps


def panels(figure: Figure) -> dict[str, Any]:
    """Return the heatmaps by title."""
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def numbers(axis: Any) -> list[list[float]]:
    """Return what a heatmap shows."""
    (image,) = axis.get_images()
    return image.get_array().tolist()


def test_heatmaps_show_norms_and_mass_of_each_role(tmp_path: Path):
    model = attach(BART)
    model.save_pretrained(tmp_path)
    summary = summarize(tmp_path)
    mass = measure_attention_mass(
        model, [{"input_ids": torch.tensor([[7, 8]]), "decoder_input_ids": torch.tensor([[3]])}]
    )
    found = panels(draw_prefix(summary, mass))
    assert list(found) == [
        f"{role}: {what}"
        for role in ("encoder", "decoder", "cross")
        for what in ("norm of keys", "norm of values", "attention on the prefix")
    ]
    layers = summary.names_of("cross")
    assert numbers(found["cross: norm of keys"]) == [summary.norms[name].key for name in layers]
    assert numbers(found["cross: norm of values"]) == [summary.norms[name].value for name in layers]
    share = found["cross: attention on the prefix"]
    assert numbers(share) == [mass.shares[name].tolist() for name in layers]
    assert share.get_images()[0].get_clim() == (0, 1)
    assert (share.get_xlabel(), share.get_ylabel()) == ("head", "layer")
    assert [label.get_text() for label in share.get_yticklabels()] == ["0", "1"]
    assert found["cross: norm of keys"].get_xlabel() == "virtual token"
    assert not any("attention" in title for title in panels(draw_prefix(summary)))


def test_heatmaps_of_embeddings_write_the_nearest_tokens(embedded: Path):
    summary, vocabulary = summarize(embedded), torch.randn(9, 32)
    nearest = find_nearest_tokens(read_embeddings(embedded), vocabulary, 2)
    texts = [["a", "$x$"], ["\n", "é"], ["\U00012000", "中"]]
    figure = draw_prefix(summary, nearest=nearest, token_texts=texts)
    found = panels(figure)
    assert list(found) == ["norm of input embedding", "nearest tokens"]
    assert numbers(found["norm of input embedding"]) == [summary.embedding_norms]
    written = [text.get_text() for text in found["nearest tokens"].texts]
    # What the font lacks, it would draw as a box, with a warning.
    assert written == ["'a'", "'$x$'", r"'\n'", "'é'", r"'\U00012000'", r"'\u4e2d'"]
    figure.canvas.draw()


def test_long_tokens_fit_into_their_cells(embedded: Path):
    nearest = find_nearest_tokens(read_embeddings(embedded), torch.randn(9, 32), 6)
    texts = [[" internationalisation"] * 6] * 3
    figure = draw_prefix(summarize(embedded), nearest=nearest, token_texts=texts)
    figure.canvas.draw()
    axis = panels(figure)["nearest tokens"]
    cell = axis.get_window_extent().width / 6
    assert max(text.get_window_extent().width for text in axis.texts) <= cell


def test_many_layers_and_tokens_are_labelled_in_steps(tmp_path: Path):
    attach(LLAMA, num_virtual_tokens=100).save_pretrained(tmp_path)
    axis = panels(draw_prefix(summarize(tmp_path)))["decoder: norm of keys"]
    assert [label.get_text() for label in axis.get_xticklabels()][:3] == ["0", "5", "10"]


def test_the_picture_is_written_alike_and_pyplot_left_alone(embedded: Path, trained: Path, tmp_path: Path):
    settings = dict(mpl.rcParams)
    for name, folder in (("one", trained), ("same", trained), ("other", embedded)):
        plot_prefix(summarize(folder), tmp_path / name)
    one, same, other = ((tmp_path / name).read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    assert pyplot.get_fignums() == []
    assert dict(mpl.rcParams) == settings


def test_the_command_draws_all_that_it_measures(embedded: Path, tmp_path: Path):
    sizes = {}
    for name, options in (("norms", []), ("all", ["--text", "tea", "--nearest-tokens", 4])):
        result = run("inspect", embedded, "--plot", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert f"The heatmaps are in {tmp_path / name}" in " ".join(result.stderr.split())
        sizes[name] = imread(tmp_path / name, format="png").shape
    assert sizes["all"][0] > sizes["norms"][0]
    assert sizes["all"][1] > sizes["norms"][1]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, heatmaps.__name__)
    with pytest.raises(ImportError, match=r"needs matplotlib; install it with: pip install 'hf_prefix\[cli\]'"):
        importlib.import_module(heatmaps.__name__)
