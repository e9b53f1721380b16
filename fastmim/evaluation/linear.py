"""Linear probe: multinomial logistic regression on standardised frozen features.

Legend: N training images, M test images, C features, Y classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

_DOUBLE_UP_TO = 2**24  # features (128 MiB); beyond, fp32 does
_ONE_THREAD_UP_TO = 2**22  # features


def fit_linear(
    x: Tensor, y: Tensor, classes: int, *, l2: float = 1.0, max_iterations: int = 300, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Minimise sum_n cross_entropy(x_n W + b, y_n) + l2/2 |W|^2 by L-BFGS from zero; nothing is random.

    Args:
        x: [N, C] fp32 or fp64, features of comparable size; y: [N] int64 in [0, classes).
        l2: strength of the penalty, 1/C of scikit-learn's `LogisticRegression`; the bias is free.
        tolerance: the largest entry of the gradient, per image, at which it counts as converged.
        max_iterations: bound for what does not converge earlier.

    Returns:
        W [C, classes] and b [classes] in the dtype of `x`.
    """
    weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(x @ weight + bias, y) + l2 / (2 * len(x)) * weight.square().sum()
            loss.backward()
        return loss

    with _one_thread(x.device.type == "cpu" and x.numel() <= _ONE_THREAD_UP_TO):
        optimizer.step(objective)
    return weight.detach(), bias.detach()


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Hundreds of products of a few microseconds: more threads would only wait for each other."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def linear_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, l2: float = 1.0, max_iterations: int = 300
) -> float:
    """Top-1 accuracy in percent of a linear classifier of frozen features.

    Each feature is shifted and scaled to mean 0 and variance 1 over the training images; one that is constant there
    (to rounding) is only shifted.

    Args:
        train_x, test_x: [N, C], [M, C] floating point; train_y, test_y: [N], [M] int64, classes from 0.
        l2, max_iterations: see `fit_linear`.

    Raises:
        ValueError: sizes that do not fit.
    """
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            "features are [images, channels] with equal channels, "
            f"but were given {list(train_x.shape)} and {list(test_x.shape)}"
        )
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if not len(x) or y.shape != x.shape[:1]:
            raise ValueError(f"{len(x)} images were given with labels {list(y.shape)}")
    dtype = torch.float64 if train_x.numel() <= _DOUBLE_UP_TO else torch.float32
    train_x, test_x = train_x.to(dtype), test_x.to(dtype)
    std, mean = torch.std_mean(train_x, dim=0, correction=0)
    std = torch.where(std > 1e-5 * train_x.abs().amax(dim=0), std, 1.0)
    classes = int(max(train_y.max(), test_y.max())) + 1
    weight, bias = fit_linear((train_x - mean) / std, train_y, classes, l2=l2, max_iterations=max_iterations)
    predictions = ((test_x - mean) / std @ weight + bias).argmax(dim=1)
    return 100 * (predictions == test_y).double().mean().item()
