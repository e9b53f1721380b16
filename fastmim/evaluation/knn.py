"""k nearest neighbours, exactly: cosine similarities by matrix product, the k largest, a weighted vote.

Legend: N training images, M test images, C features, K neighbours, Y classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_SIMILARITIES = 2**25  # held at a time: 128 MiB in fp32


def knn_predict(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classes [M] by the vote of the k nearest training images, each weighing exp(cosine similarity / temperature).

    Args:
        train_x: [N, C] floating point; train_y: [N] int64, classes from 0; test_x: [M, C] like `train_x`.
        k: neighbours that vote; all N where there are fewer.
        temperature: small values let the nearest ones decide.

    Raises:
        ValueError: sizes that do not fit, k below 1, temperature not above 0.

    Source: the evaluation of DINO (arXiv 2104.14294), after Wu et al. (arXiv 1805.01978).
    """
    _check(train_x, train_y, test_x)
    if k < 1:
        raise ValueError(f"knn: k is at least 1, but was given {k}")
    if not temperature > 0:
        raise ValueError(f"knn: temperature is above 0, but was given {temperature}")
    k = min(k, len(train_x))
    classes = int(train_y.max()) + 1
    references = F.normalize(train_x.float(), dim=1).T  # [C, N]
    queries = F.normalize(test_x.float(), dim=1)
    predictions = []
    for chunk in queries.split(max(1, _SIMILARITIES // len(train_x))):
        similarity, nearest = (chunk @ references).topk(k, dim=1)  # [m, K], descending
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the nearest weighs 1: cannot overflow
        votes = weights.new_zeros(len(chunk), classes).scatter_add_(1, train_y[nearest], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in percent of `knn_predict` on labelled test images; test_y: [M] int64."""
    _check(test_x, test_y, train_x)
    return 100 * (knn_predict(train_x, train_y, test_x, k, temperature) == test_y).double().mean().item()


def _check(x: Tensor, y: Tensor, other: Tensor) -> None:
    if x.ndim != 2 or other.ndim != 2 or x.shape[1] != other.shape[1]:
        raise ValueError(
            "features are [images, channels] with equal channels, "
            f"but were given {list(x.shape)} and {list(other.shape)}"
        )
    if y.shape != x.shape[:1]:
        raise ValueError(f"{len(x)} images were given with labels {list(y.shape)}")
    if not len(x) or not len(other):
        raise ValueError(f"there must be training and test images, but were given {len(x)} and {len(other)}")
