"""BERTScore with a tiny encoder: by hand, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from command_line import run, usage_error_of
from hf_prefix.errors import DataError, MetricUnavailableError
from hf_prefix.metrics.bertscore import bert_score

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["a", "cat", "sat", "on", "the", "mat", "dog", "ran", "off"]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [0, 2])
def test_equals_the_definition(encoder: Path, layer: int):
    text, reference = "the dog ran off", "a cat ran"
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), BertTokenizer.from_pretrained(encoder)

    def vectors(words: str) -> list[torch.Tensor]:
        with torch.no_grad():
            states = model(**tokenizer(words, return_tensors="pt"), output_hidden_states=True).hidden_states
        return list(states[layer][0])

    def closest(words: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        # Special tokens, first and last, are candidates but count for nothing themselves.
        best = [max(torch.cosine_similarity(one, other, dim=0).item() for other in others) for one in words[1:-1]]
        return sum(best) / len(best)

    precision = closest(vectors(text), vectors(reference))
    recall = closest(vectors(reference), vectors(text))
    score = bert_score([text], [[reference]], encoder, layer=layer)
    assert (score.precision, score.recall) == pytest.approx((precision, recall), abs=1e-5)
    assert score.f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert score.signature == f"tiny-bert|layer:{layer}|idf:no|rescaled:no"


def test_the_best_reference_counts_and_an_empty_text_scores_nothing(encoder: Path):
    score = bert_score(["the cat", ""], [["dog off", "the cat"], ["a mat"]], encoder, layer=2)
    assert (score.precision, score.recall, score.f1) == pytest.approx((0.5, 0.5, 0.5), abs=1e-5)


def test_on_the_command_line(encoder: Path, tmp_path: Path):
    references, texts = tmp_path / "test.jsonl", tmp_path / "texts.txt"
    references.write_text('{"article": "x", "summary": "the cat"}\n')
    texts.write_text("the cat\n")
    options = ["--task", "xsum", "--predictions", texts, "--references", references, "--bertscore-model", encoder]
    result = run("score", *options, "--bertscore-layer", 1)
    assert result.exit_code == 0, result.output
    assert "1.0000" in result.stdout
    assert "BERTScore F1: tiny-bert|layer:1" in result.stdout
    assert "give both --bertscore-model and --bertscore-layer" in usage_error_of(run("score", *options))


def test_what_is_refused(encoder: Path, tmp_path: Path):
    with pytest.raises(MetricUnavailableError, match="has layers 0 to 2; got 3"):
        bert_score(["a"], [["a"]], encoder, layer=3)
    with pytest.raises(MetricUnavailableError, match="could not be loaded"):
        bert_score(["a"], [["a"]], tmp_path / "nothing", layer=0)
    with pytest.raises(DataError, match="row 1 has no reference; BERTScore needs"):
        bert_score(["a"], [[]], encoder, layer=0)
