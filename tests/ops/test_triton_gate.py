"""Every Triton kernel and configuration that ships compiles for sm_80, sm_90 and sm_100 and spills nothing."""

import pkgutil

import pytest

import fastmim.kernels
from tests.ops.support.triton_gate import SHARED_LIMIT, TARGETS, resources

pytest.importorskip("triton")
MODULES = [
    f"fastmim.kernels.{m.name}" for m in pkgutil.iter_modules(fastmim.kernels.__path__) if m.name != "ahead_of_time"
]


def test_finds_the_kernel_files():
    assert "fastmim.kernels.random_mask" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module):
    rows = resources(module)
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        assert row["stack"] == 0, f"{row['kernel']} spills {row['stack']} bytes on sm_{row['target']}"
        assert row["shared"] <= SHARED_LIMIT[row["target"]], (
            f"{row['kernel']} uses {row['shared']} bytes of shared memory"
        )
        assert row["registers"] <= 255
