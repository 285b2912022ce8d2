"""Pairs to token ids, batches, the Trainer's loss, and batched decoding."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from families import Family, build, tokens
from hf_prefix import DataError, PrefixConfig
from hf_prefix.training import (
    DecodingSettings,
    EncodedPair,
    PairCollator,
    PairEncoder,
    PrefixTrainer,
    RepeatableOrder,
    context_length,
    generate_from_ids,
    generate_texts,
    resolve_pad_token_id,
)
from hf_prefix.training.prompting import PromptedBaseline
from test_training_guarantees import in_training
from tiny_model import CONTEXT, tiny_bart, tiny_llama, tiny_tokenizer

PAIRS = [("name : A", "A is here."), ("name : Bee | food : tea", "Bee serves tea."), ("x : y", "Yes, x is y, always.")]


def with_prefix(model: PreTrainedModel, **options: Any) -> PeftModel:
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return get_peft_model(model, PrefixConfig(task_type=task, num_virtual_tokens=4, **options))


# Encoding


def test_training_and_decoding_read_the_same_prompt():
    encoder = PairEncoder(tiny_tokenizer())
    prompts = encoder.encode_prompts([source for source, _ in PAIRS])
    for prompt, pair in zip(prompts, encoder.encode_pairs(PAIRS), strict=True):
        assert pair["input_ids"][: len(prompt)] == prompt
        assert pair["labels"] == [-100] * len(prompt) + pair["input_ids"][len(prompt) :]


def test_a_decoder_only_pair_is_prompt_target_and_one_end_token():
    tokenizer = tiny_tokenizer()
    (pair,) = PairEncoder(tokenizer).encode_pairs([("ab", "cd")])
    assert tokenizer.decode(pair["input_ids"]) == "ab\ncd</s>"


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_tokenizer_that_closes_every_text_changes_nothing(is_encoder_decoder: bool):
    tokenizer = tiny_tokenizer(closes_texts=True)
    (pair,) = PairEncoder(tokenizer, is_encoder_decoder).encode_pairs([("ab", "cd")])
    texts = [tokenizer.decode(pair["input_ids"]), tokenizer.decode([i for i in pair["labels"] if i != -100])]
    assert texts == (["ab</s>", "cd</s>"] if is_encoder_decoder else ["ab\ncd</s>", "cd</s>"])


def test_the_template_surrounds_the_source():
    tokenizer = tiny_tokenizer()
    (prompt,) = PairEncoder(tokenizer, prompt_template="Q: {source} {x}\nA:").encode_prompts(["{why}"])
    assert tokenizer.decode(prompt) == "Q: {why} {x}\nA:"


def test_a_template_without_source_is_refused():
    with pytest.raises(DataError, match=r"must contain '\{source\}', got 'Q: A:'"):
        PairEncoder(tiny_tokenizer(), prompt_template="Q: A:")


def test_a_tokenizer_without_end_token_is_refused():
    with pytest.raises(DataError, match=r"no end-of-sequence token.*eos_token"):
        PairEncoder(tiny_tokenizer(end=False))


def test_a_pair_that_is_too_long_is_named():
    encoder = PairEncoder(tiny_tokenizer(), max_length=15)
    with pytest.raises(DataError, match=r"Pair 1 .* has 18 tokens, but the limit is 15.*--skip-too-long"):
        encoder.encode_pairs([("ab", "cd"), ("a" * 12, "1234")])


def test_pairs_that_are_too_long_are_left_out_on_demand_and_counted(caplog: pytest.LogCaptureFixture):
    encoder = PairEncoder(tiny_tokenizer(), max_length=15)
    with caplog.at_level(logging.WARNING):
        pairs = encoder.encode_pairs([("ab", "cd"), ("a" * 12, "1234")], skip_too_long=True)
    assert len(pairs) == 1
    assert "Left out 1 of 2 pairs that are longer than 15 tokens." in caplog.text


def test_leaving_out_every_pair_is_refused():
    with pytest.raises(DataError, match="All 1 pairs are longer than the limit of 3 tokens"):
        PairEncoder(tiny_tokenizer(), max_length=3).encode_pairs([("abc", "d")], skip_too_long=True)


def test_no_pairs_are_refused():
    with pytest.raises(DataError, match="no training pair"):
        PairEncoder(tiny_tokenizer()).encode_pairs([])


def test_each_side_of_an_encoder_decoder_has_the_limit_for_itself():
    encoder = PairEncoder(tiny_tokenizer(), is_encoder_decoder=True, max_length=5)
    assert len(encoder.encode_pairs([("12345", "1234")])) == 1
    with pytest.raises(DataError, match="has 6 tokens, but the limit is 5"):
        encoder.encode_pairs([("1", "12345")])


def test_an_encoder_decoder_cuts_long_texts_on_demand_and_closes_them():
    tokenizer = tiny_tokenizer(closes_texts=True)
    encoder = PairEncoder(tokenizer, is_encoder_decoder=True, max_length=6, cut_source=6, cut_target=4)
    pairs = encoder.encode_pairs([("1234567", "abcdef"), ("12", "ab")])
    texts = [(tokenizer.decode(pair["input_ids"]), tokenizer.decode(pair["labels"])) for pair in pairs]
    assert texts == [("12345</s>", "abc</s>"), ("12</s>", "ab</s>")]
    assert [len(pair["input_ids"]) for pair in pairs] == [6, 3]
    assert encoder.encode_prompts(["1234567"]) == [pairs[0]["input_ids"]]


@pytest.mark.parametrize("cut", [{"cut_source": 3}, {"cut_target": 3}])
def test_a_decoder_only_model_cuts_nothing(cut: dict[str, int]):
    with pytest.raises(DataError, match="cut_source and cut_target are for encoder-decoder models"):
        PairEncoder(tiny_tokenizer(), **cut)


def test_the_prefix_takes_positions_of_a_decoder_only_model():
    assert context_length(tiny_llama().config, 10) == CONTEXT - 10
    assert context_length(tiny_bart().config, 10) == CONTEXT


def test_a_model_with_relative_positions_has_no_limit():
    from transformers import T5Config

    assert context_length(T5Config(), 10) is None


# Padding and batches


def test_padding_falls_back_to_the_end_token_and_says_so(caplog: pytest.LogCaptureFixture):
    assert resolve_pad_token_id(tiny_tokenizer()) == 0
    assert not caplog.text
    assert resolve_pad_token_id(tiny_tokenizer(pad=False)) == 2
    assert "no pad token; padding with '</s>', masked out" in caplog.text


def test_a_tokenizer_that_can_neither_pad_nor_end_is_refused():
    with pytest.raises(DataError, match=r"neither a pad token nor an end-of-sequence token.*pad_token = '<pad>'"):
        resolve_pad_token_id(tiny_tokenizer(pad=False, end=False))


EXAMPLES: list[EncodedPair] = [
    {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
    {"input_ids": [8], "labels": [8]},
]


def test_decoder_only_batches_end_together():
    batch = PairCollator(pad_token_id=9)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, 8]]


def test_decoder_only_batches_that_begin_together():
    batch = PairCollator(pad_token_id=9, padding_side="right")(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [8, -100, -100]]


def test_encoder_decoder_batches_begin_together():
    batch = PairCollator(pad_token_id=9, is_encoder_decoder=True)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [8, -100, -100]]


# The Trainer


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 3, "report_to": "none"}
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **defaults | options,
    )


def labelled_batch() -> dict[str, torch.Tensor]:
    """Return rows of unequal length, padded on the left, with labelled spans of 3 and 5 tokens."""
    input_ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    labels = input_ids.clone()
    labels[0, :9] = -100
    labels[1, :7] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def gradients(model: PeftModel) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("num_items_in_batch", [None, 20])
def test_labelled_logits_give_the_models_own_loss_and_gradients(
    causal_family: Family, num_items_in_batch: int | None, tmp_path: Any
):
    model = with_prefix(build(causal_family))
    batch = labelled_batch()
    extra = {} if num_items_in_batch is None else {"num_items_in_batch": torch.tensor(num_items_in_batch)}
    expected = model(**batch, **extra).loss
    expected.backward()
    expected_gradients = copy.deepcopy(gradients(model))
    model.zero_grad()
    trainer = PrefixTrainer(model, arguments(tmp_path), train_dataset=[0])
    loss = trainer.compute_loss(model, batch, **extra)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for found, wanted in zip(gradients(model), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def logit_columns(trainer: Trainer, batch: dict[str, torch.Tensor], **options: Any) -> int:
    widths: list[int] = []
    head = trainer.model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    trainer.compute_loss(trainer.model, batch, **options)
    hook.remove()
    (width,) = widths
    return width


def test_logits_are_computed_for_the_labelled_columns_only(causal_family: Family, tmp_path: Any):
    trainer = PrefixTrainer(with_prefix(build(causal_family)), arguments(tmp_path), train_dataset=[0])
    batch = labelled_batch()
    assert logit_columns(trainer, batch) == 5 + 1
    assert logit_columns(trainer, batch, return_outputs=True) == 12
    assert logit_columns(trainer, batch | {"labels": batch["input_ids"]}) == 12


def test_an_encoder_decoder_computes_its_plain_loss(seq2seq_family: Family, tmp_path: Any):
    model = with_prefix(build(seq2seq_family))
    batch = {"input_ids": tokens(2, 9), "labels": tokens(2, 5, seed=2)}
    expected = model(**batch).loss
    loss = PrefixTrainer(model, arguments(tmp_path), train_dataset=[0]).compute_loss(model, batch)
    assert torch.equal(loss, expected)


def trained(trainer_class: type[Trainer], pairs: Sequence[EncodedPair], folder: Any, **options: Any) -> PeftModel:
    model = with_prefix(tiny_llama())
    trainer_class(
        model, arguments(folder, **options), data_collator=PairCollator(0), train_dataset=list(pairs)
    ).train()
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_trainers_learn_the_same_prefix(accumulation: int, tmp_path: Any):
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs(PAIRS * 3)
    options = {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": "group_by_length"}
    plain = trained(Trainer, pairs, tmp_path, **options)
    ours = trained(PrefixTrainer, pairs, tmp_path, **options)
    fresh = dict(with_prefix(tiny_llama()).named_parameters())
    for (name, found), wanted in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert torch.equal(found, fresh[name]) != found.requires_grad


def padding_share(tmp_path: Any, order: Callable[[list[EncodedPair]], Any], strategy: str) -> float:
    """Return the share of padding in the batches of an epoch, each of which has all examples once."""
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs([("x" * (7 * i % 61 + 1), "y") for i in range(120)])
    options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 4}
    model = with_prefix(tiny_llama())
    trainer = Trainer(model, arguments(tmp_path, **options), data_collator=PairCollator(0), train_dataset=order(pairs))
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    assert sum(int(mask.sum()) for mask in masks) == sum(len(pair["input_ids"]) for pair in pairs)
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_batches_of_about_equal_length_have_less_padding(tmp_path: Any):
    shuffled = padding_share(tmp_path, list, "random")
    grouped = padding_share(tmp_path, list, "group_by_length")
    repeatable = padding_share(tmp_path, lambda pairs: RepeatableOrder(pairs, 4, 0), "sequential")
    assert max(grouped, repeatable) < shuffled / 3


def test_an_encoder_decoder_takes_the_same_steps_in_accumulated_batches(tmp_path: Any):
    # Targets of unequal length, so that a mean of means is not the mean.
    pairs = PairEncoder(tiny_tokenizer(), is_encoder_decoder=True).encode_pairs(PAIRS * 4)
    found = {}
    for rows in (4, 2, 1):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows, "optim": "sgd"}
        model = in_training(with_prefix(tiny_bart()))
        trainer = PrefixTrainer(
            model,
            arguments(tmp_path, learning_rate=1.0, logging_steps=1, **options),
            data_collator=PairCollator(0, is_encoder_decoder=True),
            train_dataset=pairs,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[rows] = [torch.tensor(losses), *(p for p in model.parameters() if p.requires_grad)]
    for rows in (2, 1):
        for one, whole in zip(found[rows], found[4], strict=True):
            torch.testing.assert_close(one, whole, atol=2e-6, rtol=0)


def test_evaluation_reports_a_loss_that_is_not_finite_instead_of_raising(tmp_path: Any):
    model = with_prefix(tiny_llama()).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[7] = float("inf")
    pairs = PairEncoder(tiny_tokenizer()).encode_pairs(PAIRS)
    trainer = PrefixTrainer(model, arguments(tmp_path), data_collator=PairCollator(0), eval_dataset=pairs)
    assert not torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


# Decoding


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Draw wider weights, so that the texts differ with the source."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.5)
    return model


def texts_one_by_one(model: Any, sources: Sequence[str], settings: DecodingSettings) -> list[str]:
    return [generate_texts(model, tiny_tokenizer(), [source], settings=settings)[0] for source in sources]


@pytest.mark.parametrize("build_model", [tiny_llama, tiny_bart])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_decodes_as_its_rows_alone_and_in_their_order(build_model: Any, num_beams: int):
    model = with_prefix(spread(build_model()))
    sources = ["b", "aaaaaaaa aaaa", "cc", "dddd d"]
    settings = DecodingSettings(max_new_tokens=8, num_beams=num_beams, batch_size=3, stop_string=None)
    done: list[int] = []
    texts = generate_texts(model, tiny_tokenizer(), sources, settings=settings, on_progress=done.append)
    assert texts == texts_one_by_one(model, sources, settings)
    assert len(set(texts)) > 1
    assert done == [3, 1]


class Scripted(torch.nn.Module):
    """Makes a model say a given text, whatever it reads."""

    def __init__(self, vocabulary: int, ids: list[int], prompt_length: int) -> None:
        super().__init__()
        self.vocabulary, self.ids, self.start, self.calls = vocabulary, ids, prompt_length, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.vocabulary)
        logits[..., self.ids[self.calls]] = 1.0
        self.calls += 1
        return logits


def say(text: str, settings: DecodingSettings) -> tuple[str, int]:
    """Return what decoding makes of a model that says the text, and how many tokens it asked for."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    script = Scripted(len(tokenizer), tokenizer(text)["input_ids"], 2)
    model.lm_head = script
    (found,) = generate_texts(model, tokenizer, ["s"], settings=settings)
    return found, script.calls


def test_a_text_ends_at_the_first_line_break_after_some_text():
    assert say("\n \nab c\nrest", DecodingSettings(max_new_tokens=11)) == ("ab c", 8)


def test_a_text_ends_at_the_end_token():
    assert say("ab</s>rest", DecodingSettings(max_new_tokens=7)) == ("ab", 3)


def test_without_stop_string_line_breaks_are_text():
    assert say("ab\nc ", DecodingSettings(max_new_tokens=5, stop_string=None)) == ("ab\nc", 5)


def test_banned_strings_are_not_generated():
    tokenizer, model = tiny_tokenizer(), with_prefix(spread(tiny_llama()))

    def text(*banned: str) -> str:
        settings = DecodingSettings(max_new_tokens=8, stop_string=None, banned_strings=banned, min_new_tokens=8)
        return generate_texts(model, tokenizer, ["dddd d"], settings=settings)[0]

    free = next(character for character in text() if character.isascii())
    assert free not in text(free)
    assert len(text(free)) > 1


def test_settings_replace_those_of_the_model():
    model = spread(tiny_llama())
    model.generation_config.no_repeat_ngram_size = 2
    encoded = DecodingSettings(8, 3, 1, None, 2, 0.5, True, 0, ("ab",)).options(tiny_tokenizer())
    assert encoded == {
        "max_new_tokens": 8,
        "num_beams": 3,
        "do_sample": False,
        "min_new_tokens": 2,
        "length_penalty": 0.5,
        "early_stopping": True,
        "no_repeat_ngram_size": 0,
        "bad_words_ids": tiny_tokenizer()(["ab"])["input_ids"],
    }
    texts = [
        generate_texts(model, tiny_tokenizer(), ["b"], settings=DecodingSettings(24, stop_string=None, **options))
        for options in ({}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 0})
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_decoding_leaves_the_model_in_its_mode():
    model = with_prefix(tiny_llama()).train()
    generate_texts(model, tiny_tokenizer(), ["a"], settings=DecodingSettings(max_new_tokens=1))
    assert model.training


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(DataError, match=r"Text 1 .* has 7 tokens; with max_new_tokens=4 it exceeds the context of 10"):
        generate_texts(
            tiny_llama(), tiny_tokenizer(), ["a", "abcdef"], settings=DecodingSettings(max_new_tokens=4), max_length=10
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"stop_string": ""}, "stop_string must not be empty"),
        ({"min_new_tokens": -1}, "min_new_tokens must be at least 0, got -1"),
        ({"banned_strings": ("a", "")}, "banned_strings must not hold an empty string"),
        ({"length_penalty": 0.8}, "length_penalty=0.8 is for beam search; raise num_beams"),
        ({"early_stopping": False}, "early_stopping=False is for beam search"),
    ],
)
def test_impossible_decoding_settings_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        DecodingSettings(**options)


# Baselines


def test_a_model_without_chat_template_is_asked_in_plain_text():
    tokenizer = tiny_tokenizer()
    (prompt,) = PromptedBaseline("Do it.", (("x : y", "X."),)).encode(tokenizer, ["a : b"])
    assert tokenizer.decode(prompt) == "Do it.\n\nFacts: x : y\nText: X.\n\nFacts: a : b\nText:"


def test_a_chat_model_is_asked_in_turns():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[go]"
    baseline = PromptedBaseline("Do it.", (("x : y", "X."),))
    (prompt,) = baseline.encode(tokenizer, ["a : b"])
    assert tokenizer.decode(prompt) == "[user]Do it.\nx : y[assistant]X.[user]Do it.\na : b[go]"
    (prompt,) = baseline.encode(tokenizer, ["a : b"], is_encoder_decoder=True)
    assert tokenizer.decode(prompt).startswith("Do it.\n\nFacts:")


def test_decoding_from_ids_takes_prompts_as_they_are():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    settings = DecodingSettings(max_new_tokens=6)
    prompts = PairEncoder(tokenizer).encode_prompts(["ab"])
    assert generate_from_ids(model, tokenizer, prompts, settings=settings) == generate_texts(
        model, tokenizer, ["ab"], settings=settings
    )
