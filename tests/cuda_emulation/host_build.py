"""Compiles CUDA sources with the C++ compiler, the words of CUDA coming from cuda_emulation.h."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or ""


def why_not() -> str:
    """Empty when kernels can be emulated here, else the reason."""
    return "" if COMPILER else "no C++ compiler (g++, or what CXX names) compiles the CUDA sources for the host"


@cache
def load(source: str) -> ctypes.CDLL:
    """The shared object made of tests/cuda_emulation/`source`, compiled again when anything it may include changed."""
    sources = [HERE / source, HERE / "cuda_emulation.h", *sorted((ROOT / "csrc").rglob("*.[ch]*"))]
    command = [COMPILER, "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    command += ["-Wno-unused", f"-I{ROOT / 'csrc'}", f"-I{HERE}", str(HERE / source)]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = ROOT / "build" / "cuda_emulation" / f"{Path(source).stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source} does not compile for the host:\n{done.stderr[-4000:]}"
        unfinished.rename(library)
    return ctypes.CDLL(str(library))
