"""What compiling the CUDA kernels promises, and what only emulation shows."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastmim.ops import masked_conv2d
from fastmim.ops.extension import load_extension
from tests.cuda_emulation import host_build
from tests.cuda_emulation.masked_depthwise import emulate
from tests.ops.support.triton_gate import TARGETS
from tests.ops.test_masked_conv import DEPTHWISE, make

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
REGISTERS = 65536  # of a multiprocessor
THREADS = 256  # of a block
KERNELS = (
    "pack",
    "convolve_rows",
    "convolve_positions",
    "weight_gradient_rows",
    "weight_gradient_positions",
    "add_parts",
)
LARGE = {"convolve_rows", "weight_gradient_rows"}  # two blocks a multiprocessor


def compiled_kernels() -> Path:
    """The extension, if it was built with CUDA, else what nvcc makes of the sources; skips where neither is there."""
    extension, _ = load_extension()
    if extension is not None and hasattr(extension, "masked_depthwise_cuda"):
        return Path(extension.__file__)
    if NVCC is None:
        pytest.skip("fastmim._C was built without CUDA and there is no nvcc to compile the kernels with")
    sources = sorted(CSRC.glob("cuda/*.cu"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(CSRC.glob("cuda/*")))).hexdigest()[:16]
    fat = CSRC.parent / "build" / "cuda_emulation" / f"masked_depthwise-{digest}.fatbin"
    if not fat.exists():
        fat.parent.mkdir(parents=True, exist_ok=True)
        targets = [option for t in TARGETS for option in ("-gencode", f"arch=compute_{t},code=sm_{t}")]
        source = next(path for path in sources if path.stem == "masked_depthwise")
        command = [NVCC, "-std=c++17", "-fatbin", "--threads", "2", *targets, f"-I{CSRC}", str(source), "-o", str(fat)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return fat


@pytest.mark.slow
def test_compiles_without_spills():
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", compiled_kernels()], capture_output=True, text=True, check=True).stdout
    found = set()
    for part in text.split("Fatbin elf code:")[1:]:
        target = int(re.search(r"arch = sm_(\d+)", part)[1])
        for name, usage in re.findall(r"Function (\S+):\n\s*(REG:.*)", part):
            kernel = next((k for k in KERNELS if k in name), None)
            if kernel is None:
                continue
            found.add((target, kernel))
            registers, stack, shared = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "SHARED"))
            blocks = 2 if kernel in LARGE else 3
            assert stack == 0, f"{name} spills {stack} bytes on sm_{target}"
            assert registers * THREADS * blocks <= REGISTERS, f"{name} takes {registers} registers on sm_{target}"
            assert shared <= 48 * 1024, f"{name} takes {shared} bytes of shared memory"
    assert found == {(target, kernel) for target in TARGETS for kernel in KERNELS}


@pytest.mark.skipif(bool(host_build.why_not()), reason=host_build.why_not())
@pytest.mark.parametrize("case", [c for c in DEPTHWISE if c[0]], ids=str)
def test_order_of_threads_does_not_matter(case, monkeypatch):
    """Threads and blocks backwards give the same bits: nobody reads what another thread may not have written yet."""
    emulated = emulate(monkeypatch)
    x, weight, bias, *options = make(case)
    wanted = [t.requires_grad_() for t in (x, weight, bias)]
    results = []
    try:
        for backwards in (False, True):
            emulated.set_reversed(backwards)
            y = masked_conv2d(*wanted, *options, backend="cuda")
            results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    finally:
        emulated.set_reversed(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(bool(host_build.why_not()), reason=host_build.why_not())
def test_too_many_positions_are_refused(monkeypatch):
    emulated = emulate(monkeypatch)
    with pytest.raises(RuntimeError, match=r"2\^31 or more positions"):
        emulated.masked_depthwise_cuda((1 << 16, 1 << 10, 8, 1, 7, 1), 0, 0, 0, 0, 0, 0, 0, 0, 0)
