"""What the tests of all operations share: backends, layouts, the tolerance rule and the Triton gate."""

from tests.ops.support.backend_params import Backend, backends_of
from tests.ops.support.layouts import LAYOUTS, channels_last, contiguous, offset_slice
from tests.ops.support.tolerance import assert_as_good_as_torch, poisoned_memory

__all__ = [
    "LAYOUTS",
    "Backend",
    "assert_as_good_as_torch",
    "backends_of",
    "channels_last",
    "contiguous",
    "offset_slice",
    "poisoned_memory",
]
