"""The linear probe against scikit-learn's logistic regression, which minimises the same."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fastmim.evaluation import fit_linear, linear_accuracy


def digits(images=600):
    data = load_digits()
    return torch.tensor(data.data[:images], dtype=torch.float64), torch.tensor(data.target[:images])


@pytest.mark.parametrize("l2", [0.1, 10.0])
def test_finds_scikit_learns_minimum(l2):
    x, y = digits(300)
    x = (x - x.mean(0)) / 16
    weight, bias = fit_linear(x, y, 10, l2=l2, tolerance=1e-7, max_iterations=1000)
    theirs = LogisticRegression(C=1 / l2, tol=1e-7, max_iter=2000).fit(x, y)
    torch.testing.assert_close(weight.T, torch.tensor(theirs.coef_), atol=1e-3, rtol=1e-3)
    shift = torch.tensor(theirs.intercept_).mean() - bias.mean()  # adding one number to all biases changes nothing
    torch.testing.assert_close(bias + shift, torch.tensor(theirs.intercept_), atol=1e-3, rtol=1e-3)


def test_classifies_digits_from_their_pixels():
    x, y = digits(1000)
    assert linear_accuracy(x[:700].float(), y[:700], x[700:].float(), y[700:]) > 85


def test_is_repeatable_to_the_bit_and_blind_to_shift_and_scale():
    x, y = digits()
    first = fit_linear(x[:400] / 16, y[:400], 10)
    assert all(torch.equal(a, b) for a, b in zip(first, fit_linear(x[:400] / 16, y[:400], 10), strict=True))
    scale = torch.logspace(-3, 3, 64, dtype=torch.float64)
    plain = linear_accuracy(x[:400], y[:400], x[400:], y[400:])
    assert linear_accuracy(x[:400] * scale + 5, y[:400], x[400:] * scale + 5, y[400:]) == pytest.approx(plain, abs=0.6)


def test_constant_features_and_classes_missing_in_training_do_no_harm():
    x, y = digits()
    padded = torch.cat([x, torch.full((len(x), 2), 0.1)], dim=1).float()
    kept = y[:400] != 9
    accuracy = linear_accuracy(padded[:400][kept], y[:400][kept], padded[400:], y[400:])
    assert 60 < accuracy < 100 * (y[400:] != 9).double().mean()


def test_puts_the_number_of_threads_back():
    before = torch.get_num_threads()
    x, y = digits(100)
    fit_linear(x, y, 10, max_iterations=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "shapes, message",
    [
        ((10, 6, 10, 3, 5, 3), r"\[10, 6\] and \[3, 5\]"),
        ((10, 6, 9, 3, 6, 3), r"10 images were given with labels \[9\]"),
        ((10, 6, 10, 0, 6, 0), r"0 images"),
    ],
)
def test_says_what_does_not_fit(shapes, message):
    n, c, n_labels, m, d, m_labels = shapes
    labels = [torch.zeros(count, dtype=torch.int64) for count in (n_labels, m_labels)]
    with pytest.raises(ValueError, match=message):
        linear_accuracy(torch.zeros(n, c), labels[0], torch.zeros(m, d), labels[1])
