"""BERTScore with a tiny model on this disk, empty texts included."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from echovlm_ray.evaluation.ngrams import bert_score_metric
from echovlm_ray.evaluation.statistics import NotComputableError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "simple", "cyst", "solid", "mass", "囊", "肿"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_the_same_text_is_100_and_another_one_less(model: Path) -> None:
    found = bert_score_metric(["a simple cyst", "a solid mass"], [["a simple cyst"], ["a simple cyst"]], model)
    same, other = found.statistic.rows[:, 0]
    assert same == pytest.approx(100, abs=0.01)
    assert other < 99
    assert "layer:2" in found.signature
    assert "0.3.13" in found.signature


def test_the_best_of_several_wordings_counts(model: Path) -> None:
    found = bert_score_metric(["a simple cyst"], [["a solid mass", "a simple cyst"]], model)
    assert found.statistic.value() == pytest.approx(100, abs=0.01)


def test_an_empty_answer_counts_0_and_is_told(model: Path) -> None:
    found = bert_score_metric(["", "囊肿", " "], [["囊肿"]] * 3, model)
    assert found.name == "BERTScore (2 empty answers count 0)"
    assert found.statistic.value() == pytest.approx(100 / 3, abs=0.01)


def test_what_cannot_be_computed_is_an_error_with_its_reason(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotComputableError, match="every answer is empty"):
        bert_score_metric([""], [["a cyst"]], model)
    with pytest.raises(NotComputableError, match="holds no model"):
        bert_score_metric(["a cyst"], [["a cyst"]], tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NotComputableError, match="bert-score failed"):
        bert_score_metric(["a cyst"], [["a cyst"]], tmp_path)
