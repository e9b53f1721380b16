"""What the options of `frequency_loss` come to: one transform of a scaled error.

A removed pixel shows the prediction, a visible one w_f * prediction + (1 - w_f) * replacement. By linearity the
difference of spectra is the spectrum of the difference of images, and that is the error e = prediction - image times a
constant on visible pixels:

    replacement   constant           also added
    target        w_f
    prediction    1
    mixed         (1 + w_f) / 2
    mean          w_f                (1 - w_f) * (mean of the image - image)

Gradient reaches a visible pixel with weight w_f in every case.
w_f is the share of the prediction that is kept at visible pixels (`visible_weight`).
"""

from typing import NamedTuple

__all__ = ["CHOICES", "KINDS", "Plan", "plan"]

CHOICES = {
    "form": ("paper", "code"),
    "distance": ("squared", "modulus"),
    "normalise": ("image_max", "none"),
    "reduce": ("mean", "sum"),
    "replacement": ("target", "prediction", "mixed", "mean"),
    "spatial": ("l1", "focal_l1"),
}
KINDS = ("squared", "modulus", "log", "l1", "focal_l1")


class Plan(NamedTuple):
    """What the options come to."""

    kind: str
    """One of KINDS: |D|^exponent * |D|^2, |D|^exponent * |D|, log(1 + |D|^exponent) * |D|^2, or a loss of |D|."""
    exponent: float
    normalise: bool
    """Divide the weights by their maximum, in each transformed image."""
    average: bool
    """Transform the mean over the batch, one image for all."""
    factor: float
    """The constant of the table above."""
    mean_weight: float
    """What the mean image is added with."""
    visible_weight: float
    mean: bool
    """Mean over channels and frequencies, else their sum."""


def plan(
    form: str = "paper",
    focal: bool = True,
    alpha: float = 1.0,
    distance: str = "squared",
    normalise: str = "image_max",
    reduce: str = "mean",
    visible_weight: float = 0.0,
    replacement: str = "target",
    spatial: str = "l1",
) -> Plan:
    """Reads the options of `frequency_loss`, which documents them."""
    if form == "paper":
        kind = distance
    else:
        kind = "log" if focal else spatial
    return Plan(
        kind,
        alpha if focal else 0.0,
        kind == "log" or (form == "paper" and normalise == "image_max"),
        kind == "log",
        {"prediction": 1.0, "mixed": 0.5 * (1 + visible_weight)}.get(replacement, visible_weight),
        1 - visible_weight if replacement == "mean" else 0.0,
        visible_weight,
        reduce == "mean",
    )
