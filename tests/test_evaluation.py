"""What accuracy hides, against scikit-learn and by hand."""

import pytest
import torch
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from pfedgpa_app.evaluation import scores_of

LOGITS = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).round(decimals=1)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_scores_are_those_of_scikit_learn(num_classes: int):
    logits = LOGITS[:, :num_classes]
    labels = torch.randint(num_classes, (200,), generator=torch.Generator().manual_seed(1))
    scores, predicted = scores_of(logits, labels), logits.argmax(dim=1)
    recalls = recall_score(labels, predicted, average=None)
    assert [scores[f"recall-{k}"] for k in range(num_classes)] == pytest.approx(list(recalls))
    assert scores["balanced-accuracy"] == pytest.approx(recalls.mean())
    assert scores["macro-f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert ("auroc" in scores) == (num_classes == 2)
    if num_classes == 2:  # many of the differences are equal
        expected = roc_auc_score(labels, logits[:, 1] - logits[:, 0])
        assert scores["auroc"] == pytest.approx(expected)


def test_calibration_error_is_how_far_confidence_is_off():
    """Four predictions with a confidence of 3/4, of which two are right, and two sure ones."""
    logits = torch.tensor([[3.0, 1.0]]).log().repeat(4, 1)
    sure = torch.tensor([[0.0, 50.0]]).repeat(2, 1)
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    error = scores_of(torch.cat([logits, sure]), labels)["calibration-error"]
    assert error == pytest.approx(4 * 0.25 / 6)


def test_a_class_without_examples_has_no_recall_and_one_class_no_auroc():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    scores = scores_of(logits, torch.zeros(3, dtype=torch.int64))
    assert scores.keys() == {"balanced-accuracy", "macro-f1", "calibration-error", "recall-0"}
    assert scores["balanced-accuracy"] == scores["recall-0"] == pytest.approx(2 / 3)
    # Of class 1, which was predicted once and is never there, it is 0.
    assert scores["macro-f1"] == pytest.approx(0.8 / 2)


def test_logits_that_are_not_finite_have_no_scores():
    assert scores_of(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0])) == {}
