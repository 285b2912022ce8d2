"""Put a trained prefix into a running llama.cpp server and let it write.

Start the server with a GGUF file of the prefix's base model and a folder for its slots:

    llama-server --model base.gguf --slot-save-path slots/

and, on the same machine:

    python examples/serving/llama_cpp.py my-prefix --slot-folder slots "name : The Tin Owl | kind : tavern"
"""

import argparse
import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prefix.serving.llama_cpp import llama_cpp_slot
from hf_prefix.sharing import SavedPrefix


def post(address: str, body: dict[str, Any]) -> Any:
    """Send a request to the server and return its answer."""
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urlopen(request, timeout=600) as response:  # noqa: S310
        return json.load(response)


def main() -> None:
    """Export the prefix, restore it, and complete each text."""
    arguments = parse_arguments()
    prefix = SavedPrefix.load(arguments.prefix)
    location = arguments.model or prefix.config.base_model_name_or_path
    source = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    base = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(location, **source)
    # Loading it refuses a prefix of another base.
    base = PeftModel.from_pretrained(base, arguments.prefix).get_base_model()

    # Any tokens do: they name the prefix. Prompts that start otherwise never see it.
    generator = torch.Generator().manual_seed(arguments.seed)
    vocabulary = base.config.get_text_config().vocab_size
    names = torch.randint(vocabulary, (prefix.num_virtual_tokens,), generator=generator).tolist()
    server, slot = arguments.server.rstrip("/"), arguments.slot
    post(f"{server}/completion", {"prompt": names, "n_predict": 0, "id_slot": slot})
    post(f"{server}/slots/{slot}?action=save", {"filename": "template.bin"})
    template = (arguments.slot_folder / "template.bin").read_bytes()
    filled, names = llama_cpp_slot(prefix, base, template)
    (arguments.slot_folder / "prefix.bin").write_bytes(filled)
    post(f"{server}/slots/{slot}?action=restore", {"filename": "prefix.bin"})

    greedy = {"n_predict": arguments.max_new_tokens, "samplers": ["temperature"], "temperature": 0, "id_slot": slot}
    for text in arguments.texts:
        answer = post(f"{server}/completion", {"prompt": names + tokenizer(text)["input_ids"], **greedy})
        cached = answer["timings"]["cache_n"]
        print(json.dumps({"cached": cached, "text": answer["content"], "virtual_tokens": len(names)}))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="folder or Hub name of the prefix")
    parser.add_argument("texts", nargs="+", help="prompts to complete")
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    parser.add_argument("--slot-folder", type=Path, required=True, help="the server's --slot-save-path")
    parser.add_argument("--slot", type=int, default=0)
    parser.add_argument("--model", help="base model, if not the one that the prefix names")
    parser.add_argument("--gguf-file", help="GGUF file in the base model's folder")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the tokens that name the prefix")
    return parser.parse_args()


if __name__ == "__main__":
    main()
