"""Compare vLLM with a prefix, through the connector beside this file, with transformers.

python examples/serving/vllm/check.py BASE_MODEL PREFIX "a question" "another one"
"""

import argparse
import json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams, TokensPrompt

from hf_prefix.sharing import SavedPrefix


def main() -> None:
    """Print for each question how many tokens agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="base model")
    parser.add_argument("prefix", help="folder of the prefix")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--block-size", type=int, help="tokens in a block of vLLM's cache")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    arguments = parser.parse_args()

    names = list(range(1000, 1000 + SavedPrefix.load(arguments.prefix).num_virtual_tokens))
    connector = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefix_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"prefixes": {arguments.prefix: names}},
    }
    options = {"block_size": arguments.block_size, "enforce_eager": arguments.eager, "max_model_len": 512}
    engine = LLM(arguments.model, dtype=arguments.dtype, kv_transfer_config=connector, **options)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    questions = [tokenizer(question)["input_ids"] for question in arguments.questions]
    greedy = SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens)
    # Twice, since vLLM has whole blocks of the prefix in its own cache the second time.
    prompts = [TokensPrompt(prompt_token_ids=names + question) for question in questions]
    rounds = [engine.generate(prompts, greedy) for _ in range(2)]
    without = engine.generate([TokensPrompt(prompt_token_ids=question) for question in questions], greedy)

    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = PeftModel.from_pretrained(base, arguments.prefix).eval()
    for number, question in enumerate(questions):
        tokens = torch.tensor([question])
        written = model.generate(tokens, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        wanted = written[0, len(question) :].tolist()
        answers = [list(outputs[number].outputs[0].token_ids) for outputs in rounds]
        base_answer = list(without[number].outputs[0].token_ids)
        print(
            json.dumps(
                {
                    "equal": [answer == wanted for answer in answers],
                    "tokens": len(wanted),
                    "cached": [outputs[number].num_cached_tokens for outputs in rounds],
                    "differs from the base": base_answer != wanted,
                    "text": tokenizer.decode(wanted),
                }
            )
        )


if __name__ == "__main__":
    main()
