"""k-NN against a loop written from its definition, and against scikit-learn."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import fastmim.evaluation.knn as knn
from fastmim.evaluation import knn_accuracy, knn_predict


def clusters(images, classes=4, channels=6, spread=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, channels, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (images,), generator=generator)
    return centres[labels] + spread * torch.randn(images, channels, generator=generator), labels


def by_definition(train_x, train_y, test_x, k, temperature):
    predictions = []
    for query in test_x.double():
        similarity = [float(torch.cosine_similarity(query, x, dim=0)) for x in train_x.double()]
        nearest = sorted(range(len(train_x)), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * (int(train_y.max()) + 1)
        for i in nearest:
            votes[int(train_y[i])] += math.exp(similarity[i] / temperature)
        predictions.append(votes.index(max(votes)))
    return torch.tensor(predictions)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 1.0), (200, 0.07)])
def test_equals_its_definition(k, temperature):
    (train_x, train_y), (test_x, _) = clusters(60, spread=2.0), clusters(25, spread=2.0, seed=1)
    expected = by_definition(train_x, train_y, test_x, k, temperature)
    assert torch.equal(knn_predict(train_x, train_y, test_x, k, temperature), expected)


def test_at_high_temperature_it_is_scikit_learns_plain_vote():
    (train_x, train_y), (test_x, _) = clusters(200, spread=2.0), clusters(80, spread=2.0, seed=1)
    theirs = KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(train_x, train_y).predict_proba(test_x)
    ours = knn_predict(train_x, train_y, test_x, 7, 1e6)
    assert (theirs[range(80), ours] == theirs.max(axis=1)).all()  # a tie may be broken either way


def test_chunks_change_nothing(monkeypatch):
    (train_x, train_y), (test_x, test_y) = clusters(50), clusters(31, seed=1)
    whole = knn_predict(train_x, train_y, test_x)
    monkeypatch.setattr(knn, "_SIMILARITIES", 150)
    assert torch.equal(knn_predict(train_x, train_y, test_x), whole)
    assert knn_accuracy(train_x, train_y, test_x, test_y) == pytest.approx(100 * (whole == test_y).double().mean())


def test_the_size_of_features_does_not_matter_and_zero_features_do_no_harm():
    (train_x, train_y), (test_x, test_y) = clusters(60), clusters(30, seed=1)
    expected = knn_predict(train_x, train_y, test_x)
    assert torch.equal(knn_predict(train_x * 1e3, train_y, test_x * 1e-3), expected)
    assert 0 <= knn_accuracy(torch.zeros_like(train_x), train_y, test_x, test_y) <= 100


def test_half_precision_features_are_compared_in_fp32():
    (train_x, train_y), (test_x, test_y) = clusters(60), clusters(30, seed=1)
    assert knn_accuracy(train_x.bfloat16(), train_y, test_x.bfloat16(), test_y, temperature=1e-3) > 80


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k is at least 1, but was given 0"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"test_x": torch.zeros(3, 5)}, r"\[10, 6\].*\[3, 5\]|\[3, 5\].*\[10, 6\]"),
        ({"train_y": torch.zeros(9, dtype=torch.int64)}, r"10 images were given with labels \[9\]"),
        ({"test_y": torch.zeros(2, dtype=torch.int64)}, r"3 images were given with labels \[2\]"),
        ({"test_x": torch.zeros(0, 6), "test_y": torch.zeros(0, dtype=torch.int64)}, "given 0 and 10"),
    ],
)
def test_says_what_does_not_fit(change, message):
    given = {
        "train_x": torch.zeros(10, 6),
        "train_y": torch.zeros(10, dtype=torch.int64),
        "test_x": torch.zeros(3, 6),
        "test_y": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**(given | change))
