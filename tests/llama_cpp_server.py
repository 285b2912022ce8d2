"""A llama.cpp server of the package xllamacpp in a process of its own, and GGUF files for it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import numpy as np
from gguf.quants import dequantize
from transformers import PreTrainedModel

SERVER = """
import sys
import xllamacpp

model, slots, cache_type, slots_in_parallel, flash_attention = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.slot_save_path, params.port = model, slots + "/", 0
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 512, int(slots_in_parallel), False, 1
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type.upper()}")
params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash_attention.upper()}")
server = xllamacpp.Server(params)
print("ADDRESS", server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class LlamaCppServer:
    """A running server.

    Args:
        address: Where it listens.
        slots: The folder of its slot files.
    """

    address: str
    slots: Path

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer."""
        request = Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
        with urlopen(request, timeout=60) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
        return answer

    def complete(self, prompt: list[Any], count: int, slot: int = 0) -> dict[str, Any]:
        """Continue a prompt of tokens and texts greedily, with the log-probabilities of the likeliest tokens."""
        greedy = {
            "samplers": ["temperature"],
            "temperature": 0,
            "n_probs": 3,
            "return_tokens": True,
            "ignore_eos": True,
        }
        return self.post("/completion", {"prompt": prompt, "n_predict": count, "id_slot": slot, **greedy})

    def save(self, token_ids: list[int], name: str, slot: int = 0) -> Path:
        """Let the server process tokens and save the slot."""
        self.post("/completion", {"prompt": token_ids, "n_predict": 0, "id_slot": slot})
        assert self.post(f"/slots/{slot}?action=save", {"filename": name})["n_saved"] == len(token_ids)
        return self.slots / name

    def restore(self, name: str, slot: int = 0) -> int:
        """Restore a slot and return how many tokens it has."""
        restored: int = self.post(f"/slots/{slot}?action=restore", {"filename": name})["n_restored"]
        return restored


@contextmanager
def running(
    model: Path, slots: Path, cache_type: str = "f32", parallel: int = 1, flash_attention: str = "auto"
) -> Iterator[LlamaCppServer]:
    """Run a server while the block runs.

    Args:
        model: A GGUF file.
        slots: Folder for its slot files.
        cache_type: Type of its keys and values.
        parallel: Number of slots.
        flash_attention: "auto", "enabled" or "disabled", which keeps values transposed.
    """
    slots.mkdir(exist_ok=True)
    command = [sys.executable, "-c", SERVER, str(model), str(slots), cache_type, str(parallel), flash_attention]
    log = slots.with_suffix(".log")
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            lines = (line for line in iter(process.stdout.readline, "") if line.startswith("ADDRESS "))
            line = next(lines, "")
            assert line, log.read_text(encoding="utf-8")
            yield LlamaCppServer(line.split()[1], slots)
        finally:
            process.kill()


def write_dequantised(source: Path, target: Path) -> Path:
    """Write the weights of a GGUF file in float32, so that they are those that transformers computes with."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.quantization_version")):
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            value = 0 if field.name == "general.file_type" else field.contents()
            writer.add_key_value(field.name, value, kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    return _finish(writer, target)


def write_model(model: PreTrainedModel, target: Path) -> Path:
    """Write a tiny Llama or Qwen3 as llama.cpp's own converter does; Llama's rotary pairs lie side by side."""
    config = model.config
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[config.model_type]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokens(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[-1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    return _finish(writer, target)


def _add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    """Add tokens of letters and digits: the server holds a token back whose bytes are no text yet."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    # There must be one.
    writer.add_token_merges(["t 0"])
    # Or token 11 would be both.
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _finish(writer: gguf.GGUFWriter, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
