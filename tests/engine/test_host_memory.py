"""Freed memory is used again instead of being asked for anew, in a process of its own because it is for good."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from fastmim.engine.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(20):  # until what lies between has found its place
    if turn == 10:
        before = faults()
    torch.ones(10 << 20)  # 40 MiB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_large_blocks_are_used_again():
    found = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found["leave"] > 100, "each block comes anew: otherwise this test shows nothing"
    assert found["keep"] < found["leave"] / 10


def test_another_malloc_is_left_alone(monkeypatch):
    from fastmim.engine import host_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not host_memory.keep_freed_memory()
