"""Context distillation: the teacher is the base model with the text in front, the student comes near it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from families import START, VOCABULARY, Family, build, tokens
from hf_prefix import DataError, PrefixConfig, TrainingError
from hf_prefix.training import PairCollator
from hf_prefix.training.distillation import (
    AnswerSettings,
    Context,
    DistillationTrainer,
    Lesson,
    LessonCollator,
    Teacher,
    ask_questions,
    kl_divergence,
    likeliest,
    mean_kl_divergence,
)
from matrix import BY_NAME
from tiny_model import CONTEXT, tiny_bart, tiny_llama, tiny_tokenizer

TEXT = Context(tokens(1, 23, seed=5)[0].tolist())
QUERIES = [row.tolist() for row in tokens(4, 9, seed=6)]
QUERIES = [query[:length] for query, length in zip(QUERIES, (3, 9, 5, 3), strict=True)]
ANSWERS = [row.tolist()[:length] for row, length in zip(tokens(4, 6, seed=7), (6, 1, 4, 2), strict=True)]
NO_STOP = AnswerSettings(max_new_tokens=6, stop_string=None)


def hybrid() -> PreTrainedModel:
    """Return a model of a convolution and an attention layer, whose cache holds more than keys and values."""
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.Lfm2ForCausalLM(config).eval()


def teacher_of(model: PreTrainedModel | PeftModel, context: Context = TEXT) -> Teacher:
    return Teacher(model, tiny_tokenizer(), context)


def lessons_of(model: PreTrainedModel, context: Context = TEXT, **options: Any) -> list[Lesson]:
    return teacher_of(model, context).lessons(QUERIES, ANSWERS, **options)


def student_of(model: PreTrainedModel, length: int, context: Context = TEXT, **options: Any) -> PeftModel:
    config = PrefixConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        num_virtual_tokens=length,
        prefix_init="token_ids",
        prefix_init_token_ids=context.start_token_ids(length),
        **options,
    )
    return get_peft_model(model, config)


@torch.no_grad()
def logits_alone(model: PreTrainedModel, context: Context, query: list[int], answer: list[int]) -> Tensor:
    """Return the logits of one answer's tokens the slow way: the whole text as one row, no cache, no padding."""
    source = torch.tensor([context.token_ids + query])
    if model.config.is_encoder_decoder:
        return model(input_ids=source, decoder_input_ids=torch.tensor([[START, *answer[:-1]]])).logits[0]
    row = torch.cat([source, torch.tensor([answer])], dim=1)
    return model(input_ids=row, use_cache=False).logits[0, source.shape[1] - 1 : -1]


# The divergence


def test_the_divergence_over_the_whole_vocabulary_is_the_exact_one():
    teacher, student = torch.randn(2, 5, 11) * 3, (torch.randn(2, 5, 11) * 3).requires_grad_()
    exact = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    found = kl_divergence(likeliest(teacher, 11), student)
    torch.testing.assert_close(found, exact)
    gradients = [torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (found, exact)]
    torch.testing.assert_close(*gradients)


def test_other_tokens_count_together():
    teacher, student = torch.randn(11), torch.randn(11)
    p, q = teacher.softmax(-1), student.softmax(-1)
    best = sorted(range(11), key=lambda token: -float(p[token]))[:3]
    rest_p, rest_q = 1 - sum(p[token] for token in best), 1 - sum(q[token] for token in best)
    expected = sum(p[token] * (p[token] / q[token]).log() for token in best) + rest_p * (rest_p / rest_q).log()
    found = kl_divergence(likeliest(teacher, 3), student)
    torch.testing.assert_close(found, expected)
    assert 0 < found < kl_divergence(likeliest(teacher, 11), student)


def test_a_sure_teacher_gives_finite_numbers_and_gradients():
    teacher = torch.tensor([200.0, 0.0, -200.0, -300.0])
    student = torch.zeros(4).requires_grad_()
    kl_divergence(likeliest(teacher, 1), student).backward()
    assert likeliest(teacher, 1).rest < -199
    torch.testing.assert_close(student.grad, torch.tensor([-0.75, 0.25, 0.25, 0.25]))


# The context


def test_a_context_ends_without_end_token_and_begins_once():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        ]
    )
    context = Context.from_text(tokenizer, "ab\n")
    assert tokenizer.decode(context.token_ids) == "<s>ab\n"
    query = tokenizer("c")["input_ids"]
    assert tokenizer.decode(context.token_ids + context.without_begin(query)) == "<s>ab\nc</s>"
    assert Context.from_text(tiny_tokenizer(), "ab").without_begin(query) == query
    with pytest.raises(DataError, match="context is an empty text"):
        Context.from_text(tokenizer, "")


def test_a_short_start_is_the_beginning_and_the_end():
    context = Context(list(range(10, 40)))
    assert context.start_token_ids(9) == [10, 11, 12, 13, 35, 36, 37, 38, 39]
    assert context.start_token_ids(1) == [39]
    assert context.start_token_ids(30) == context.token_ids
    with pytest.raises(DataError, match=r"has 30 tokens.*from 1 to 30 virtual tokens; got 31"):
        context.start_token_ids(31)


def test_a_context_without_tokens_is_refused():
    with pytest.raises(DataError, match="no token"):
        Context([])


# The teacher


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_teacher_is_the_base_model_with_the_text_in_front(family: Family, batch_size: int):
    model = build(family)
    for query, answer, lesson in zip(QUERIES, ANSWERS, lessons_of(model, batch_size=batch_size), strict=True):
        expected = likeliest(logits_alone(model, TEXT, query, answer), 64)
        assert torch.equal(lesson["teacher_token_ids"], expected.token_ids)
        torch.testing.assert_close(lesson["teacher_log_probs"], expected.log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lesson["teacher_rest"], expected.rest, atol=1e-5, rtol=1e-5)


def test_the_teacher_answers_as_the_base_model_does_alone(family: Family):
    model = build(family)
    answers = teacher_of(model).answers(QUERIES, NO_STOP)
    for query, answer in zip(QUERIES, answers, strict=True):
        source = torch.tensor([TEXT.token_ids + query])
        output = model.generate(source, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
        assert answer == output[0, 1 if family.is_encoder_decoder else source.shape[1] :].tolist()


def test_queries_longer_than_the_context_share_a_batch():
    model, short = build(BY_NAME["llama"]), Context([7, 8])
    answers = teacher_of(model, short).answers(QUERIES, NO_STOP)
    for query, answer in zip(QUERIES, answers, strict=True):
        assert answer == teacher_of(model, short).answers([query], NO_STOP)[0]
        assert answer == logits_alone(model, short, query, answer).argmax(dim=-1).tolist()


@pytest.mark.parametrize("make", [hybrid, lambda: build(BY_NAME["bart"])], ids=["hybrid", "bart"])
def test_a_context_that_is_more_than_keys_and_values_is_read_each_time(make: Any):
    model = make()
    teacher = teacher_of(model)
    assert not teacher.reads_context_once
    assert teacher_of(tiny_llama()).reads_context_once
    for query, answer, lesson in zip(QUERIES, ANSWERS, teacher.lessons(QUERIES, ANSWERS), strict=True):
        expected = likeliest(logits_alone(model, TEXT, query, answer), 64)
        torch.testing.assert_close(lesson["teacher_log_probs"], expected.log_probs, atol=1e-5, rtol=1e-5)
    (answer,) = teacher.answers(QUERIES[:1], NO_STOP)
    best = logits_alone(model, TEXT, QUERIES[0], answer).argmax(dim=-1).tolist()
    assert answer == best


def test_a_prefix_on_the_model_does_not_change_the_teacher():
    before = lessons_of(tiny_llama())
    student = student_of(tiny_llama(), 5)
    after = teacher_of(student).lessons(QUERIES, ANSWERS)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old["teacher_log_probs"], new["teacher_log_probs"])


def test_an_answer_ends_with_what_ended_it():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    (whole,) = teacher_of(model).answers(QUERIES[:1], NO_STOP)
    assert len(whole) == 6
    stop = tokenizer.decode(whole[2])
    (stopped,) = teacher_of(model).answers(QUERIES[:1], AnswerSettings(max_new_tokens=6, stop_string=stop))
    found = next(count for count in range(1, 7) if stop in tokenizer.decode(whole[:count]).lstrip())
    assert stopped == whole[:found]
    model.generation_config.eos_token_id = whole[3]
    (ended,) = teacher_of(model).answers(QUERIES[:1], NO_STOP)
    assert ended == whole[: whole.index(whole[3]) + 1]


def test_a_draw_depends_on_its_seed_alone():
    teacher = teacher_of(tiny_llama())
    drawn = [
        teacher.answers(QUERIES, AnswerSettings(6, temperature=1.0, stop_string=None, seed=seed)) for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    state = torch.get_rng_state()
    teacher.answers(QUERIES[:1], NO_STOP)
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_every_query():
    counts: list[int] = []
    teacher = teacher_of(tiny_llama())
    teacher.lessons(QUERIES, teacher.answers(QUERIES, NO_STOP, counts.append), on_progress=counts.append)
    assert sum(counts) == 2 * len(QUERIES)


def test_a_context_that_does_not_fit_is_refused():
    long = Context([7] * CONTEXT)
    with pytest.raises(DataError, match=rf"reads {CONTEXT} tokens of context and 0 .* exceeds the {CONTEXT} tokens"):
        teacher_of(tiny_llama(), long)
    assert teacher_of(tiny_bart(), long)
    with pytest.raises(DataError, match=r"reads 512 tokens of context and 3 of the query and answers with up to 6"):
        teacher_of(tiny_bart(), long).lessons(QUERIES, ANSWERS)
    with pytest.raises(DataError, match=r"505 tokens of context and 3 .* up to 6; that exceeds the 512"):
        teacher_of(tiny_llama(), Context([7] * 505)).answers(QUERIES, NO_STOP)


def test_impossible_requests_are_refused():
    teacher = teacher_of(tiny_llama())
    with pytest.raises(DataError, match=r"Answer 1 .* is empty"):
        teacher.lessons(QUERIES[:2], [[5], []])
    begun = teacher_of(tiny_llama(), Context([1, 7], begin_token_id=1))
    for empty in ([], [1]):
        with pytest.raises(DataError, match=r"Query 1 .* is empty; it needs at least one token"):
            begun.answers([QUERIES[0], empty], NO_STOP)
        with pytest.raises(DataError, match=r"Query 1 .* is empty; it needs at least one token"):
            begun.lessons([QUERIES[0], empty], ANSWERS[:2])
    with pytest.raises(DataError, match="top_k and batch_size must be at least 1, got 0 and 16"):
        teacher.lessons(QUERIES, ANSWERS, top_k=0)
    for wrong in ({"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}, {"stop_string": ""}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            AnswerSettings(**wrong)


# The student


def divergence_alone(student: PeftModel, lesson: Lesson, query: list[int], answer: list[int]) -> Tensor:
    """Return the full divergence from the teacher at each token of one answer, without padding."""
    model = student.get_base_model()
    with student.disable_adapter():
        teacher = logits_alone(model, TEXT, query, answer)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            words = torch.tensor([[START, *answer[:-1]]])
            logits = student(input_ids=torch.tensor([query]), decoder_input_ids=words).logits[0]
        else:
            logits = student(input_ids=torch.tensor([query + answer])).logits[0, len(query) - 1 : -1]
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)


def test_a_batch_of_padded_lessons_diverges_as_its_lessons_alone(family: Family):
    model = build(family)
    lessons = lessons_of(model, top_k=VOCABULARY)
    student = student_of(model, 6).eval()
    found = mean_kl_divergence(student, lessons, LessonCollator.for_model(model, tiny_tokenizer()), batch_size=4)
    alone = [divergence_alone(student, *row) for row in zip(lessons, QUERIES, ANSWERS, strict=True)]
    assert found == pytest.approx(float(torch.cat(alone).mean()), rel=1e-4)
    assert found > 0.01


def test_a_student_that_starts_from_the_whole_context_is_the_teacher(causal_family: Family):
    model = build(causal_family)
    lessons, collator = lessons_of(model, top_k=VOCABULARY), LessonCollator(0)
    without = mean_kl_divergence(model, lessons, collator)
    # As a prompt would: with "pin", the sliding windows of Gemma 3 and Mistral would see more of the context.
    student = student_of(model, len(TEXT), sliding_window="scroll")
    assert abs(mean_kl_divergence(student, lessons, collator)) < 1e-5 < without


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 2, "learning_rate": 2e-2, "max_steps": 12, "report_to": "none"}
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
        train_sampling_strategy="group_by_length",
        **defaults | options,
    )


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_training_brings_the_student_nearer(name: str, tmp_path: Path):
    model = build(BY_NAME[name])
    lessons = lessons_of(model)
    student = student_of(model, 6)
    collator = LessonCollator.for_model(model, tiny_tokenizer())
    trainer = DistillationTrainer(student, arguments(tmp_path), data_collator=collator, train_dataset=lessons)
    before = mean_kl_divergence(student, lessons, collator)
    trainer.train()
    assert mean_kl_divergence(student, lessons, collator) < 0.8 * before


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_loss_of_the_trainer_is_the_divergence(name: str, tmp_path: Path):
    model = build(BY_NAME[name])
    lessons, collator = lessons_of(model), LessonCollator.for_model(model, tiny_tokenizer())
    student = student_of(model, 6)
    options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 1}
    trainer = DistillationTrainer(
        student, arguments(tmp_path, **options), data_collator=collator, train_dataset=lessons, eval_dataset=lessons
    )
    expected = mean_kl_divergence(student, lessons, collator)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    student.eval()
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(student, collator(lessons), return_outputs=True)
        alone = trainer.compute_loss(student, collator(lessons))
    assert [float(loss), float(alone)] == pytest.approx([expected] * 2, rel=1e-5)
    assert outputs.logits.shape[:2] == collator(lessons)["labels"].shape
    if name == "llama":
        # The others have dropout in training.
        trainer.train()
        assert trainer.state.log_history[-2]["loss"] == pytest.approx(expected, rel=1e-5)


def test_accumulated_batches_train_as_one_batch(tmp_path: Path):
    ends = []
    for rows in (4, 1):
        model = build(BY_NAME["llama"])
        lessons, student = lessons_of(model), student_of(model, 6)
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows, "max_steps": 2}
        trainer = DistillationTrainer(
            student, arguments(tmp_path, **options), data_collator=LessonCollator(0), train_dataset=lessons
        )
        trainer.train()
        ends.append([parameter.detach() for parameter in student.parameters() if parameter.requires_grad])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_batches_without_a_teacher_are_refused(tmp_path: Path):
    student = student_of(tiny_llama(), 6)
    pairs = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    trainer = DistillationTrainer(student, arguments(tmp_path), data_collator=PairCollator(0), train_dataset=pairs * 2)
    with pytest.raises(DataError, match=r"no \['teacher_token_ids', .*lessons of a Teacher"):
        trainer.train()
    with pytest.raises(DataError, match="no lesson to measure"):
        mean_kl_divergence(student, [], LessonCollator(0))


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": print}, {"loss_reduction": "sentence"}]
)
def test_a_second_loss_is_refused(wrong: dict[str, Any], tmp_path: Path):
    smoothed = "label_smoothing_factor" in wrong
    settings = arguments(tmp_path, **(wrong if smoothed else {}))
    with pytest.raises(TrainingError, match=f"leave out .*{next(iter(wrong))}"):
        DistillationTrainer(student_of(tiny_llama(), 6), settings, **({} if smoothed else wrong))


def test_a_divergence_that_is_not_finite_stops_the_training(tmp_path: Path):
    model = tiny_llama()
    lessons, student = lessons_of(model), student_of(model, 6)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, learning_rate=1e38), data_collator=LessonCollator(0), train_dataset=lessons
    )
    with pytest.raises(TrainingError, match="The loss is nan at step 2"):
        trainer.train()


# Self-study


def test_the_model_asks_itself_different_questions():
    teacher, tokenizer = teacher_of(tiny_llama()), tiny_tokenizer()
    settings = AnswerSettings(max_new_tokens=8, temperature=1.0)
    asked = ask_questions(teacher, tokenizer, 12, settings=settings)
    assert len(set(asked)) == len(asked) == 12
    assert all(question == question.strip() != "" and "\n" not in question for question in asked)
    assert asked == ask_questions(teacher, tokenizer, 12, settings=settings)


def test_a_model_that_repeats_itself_is_reported(caplog: pytest.LogCaptureFixture):
    teacher = teacher_of(tiny_llama())
    cold = AnswerSettings(max_new_tokens=2, temperature=1e-6)
    with caplog.at_level(logging.WARNING):
        asked = ask_questions(teacher, tiny_tokenizer(), 5, seed_prompts=["Ask:"], settings=cold)
    assert len(asked) == 1
    assert "asked only 1 different questions, not 5" in caplog.text


def test_self_study_without_a_draw_is_refused():
    with pytest.raises(DataError, match=r"temperature above 0; got count=3, 6 seed prompts and temperature=0"):
        ask_questions(teacher_of(tiny_llama()), tiny_tokenizer(), 3, settings=NO_STOP)
