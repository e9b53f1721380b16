"""Compiles what a kernel file ships for sm_80, sm_90 and sm_100 without a GPU and reads the resources used.

`python -m tests.ops.support.triton_gate fastmim.kernels.random_mask` prints one JSON line per kernel and target.
It runs in a process of its own, because TRITON_INTERPRET must not be set when the kernels are defined.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use


def resources(module: str) -> list[dict[str, Any]]:
    """One dict per (configuration, target) of `module`: kernel, target, registers, stack (spills), shared; in bytes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, module], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, f"{module} does not compile ahead of time:\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _compile(config: Any, target: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = config.kernel.arg_names
    signature = {name: config.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in config.aligned}
    constants = {(names.index(name),): value for name, value in config.constants.items()}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    compiled = triton.compile(
        ASTSource(config.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", target, 32),
        options=options,
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return {"kernel": str(config), "target": target, "shared": compiled.metadata.shared, **usage}


def _compile_one(place: int) -> dict[str, Any]:
    return _compile(*wanted[place])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump said nothing of registers:\n{text}")
    return {"registers": int(registers[1]), "stack": int(stack[1])}


def not_listed(module: str) -> list[str]:
    """Kernels of `module` that no configuration ships: neither in AHEAD_OF_TIME nor called by another kernel."""
    loaded = importlib.import_module(module)
    kernels = {
        name: value
        for name, value in vars(loaded).items()
        if hasattr(value, "arg_names") and hasattr(value, "fn") and value.fn.__module__ == module
    }
    listed = {config.kernel for config in loaded.AHEAD_OF_TIME}
    sources = {name: Path(loaded.__file__).read_text().count(f"{name}(") for name in kernels}  # type: ignore[arg-type]
    return [name for name, kernel in kernels.items() if kernel not in listed and sources[name] < 2]


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    missing = not_listed(sys.argv[1])
    if missing:
        sys.exit(f"{sys.argv[1]}: AHEAD_OF_TIME lists no configuration of {', '.join(missing)}")
    wanted = [(config, target) for config in module.AHEAD_OF_TIME for target in TARGETS]
    workers = min(len(os.sched_getaffinity(0)), 8)
    # Forked, so that a job is a place in the list: a kernel does not pickle.
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=64) as pool:
        for row in pool.imap(_compile_one, range(len(wanted)), chunksize=3):
            print(json.dumps(row))
