"""The plain PyTorch way, one file a method: what one would write without this package, and what it is measured against.

`baseline_of(method)` builds the plain twin of one of our methods, with the same weights.
"""

from benchmarks.baselines.twins import baseline_of

__all__ = ["baseline_of"]
