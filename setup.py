"""Drives CMake for the compiled part (fastmim._C); everything else is in pyproject.toml.

The compiled part is optional: when it cannot be built the package is installed without it, the reason is kept in
fastmim/_build_failure.txt and `python -m fastmim.info` prints it. FASTMIM_EXTENSION=required makes a failure an error.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        reason = ROOT / "fastmim" / "_build_failure.txt"
        packaged_reason = output.parent / reason.name
        for stale in {reason, packaged_reason}:
            stale.unlink(missing_ok=True)
        try:
            self._cmake(build, output.parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            message = _explain(error)
            if os.environ.get("FASTMIM_EXTENSION") == "required":
                raise CompileError(message) from error
            packaged_reason.parent.mkdir(parents=True, exist_ok=True)
            for place in {reason, packaged_reason}:
                place.write_text(message + "\n")
            ext.optional = True  # setuptools then warns and goes on
            raise CompileError(message) from error

    def _cmake(self, build: Path, output: Path) -> None:
        import pybind11

        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTMIM_OUTPUT={output}",
        ]  # fmt: skip
        for name in ("FASTMIM_CUDA", "FASTMIM_CUDA_ARCHITECTURES"):
            if value := os.environ.get(name):
                configure.append(f"-D{name}={value}")
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            print(done.stdout, flush=True)
            if done.returncode:
                raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)


def _explain(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.output).splitlines() if line.strip()]
        return f"`{' '.join(error.cmd[:2])} ...` ended with {error.returncode}:\n" + "\n".join(lines[-30:])
    return f"{type(error).__name__}: {error}"


setup(ext_modules=[Extension("fastmim._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
