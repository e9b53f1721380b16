"""`python -m fastmim.info`: what this installation can do; for each operation, which backend runs and why no other."""

import importlib.util
import os
import platform
import sys
from importlib import metadata

import torch

import fastmim
import fastmim.ops  # registers the operations
from fastmim.closed_output import while_output_is_read
from fastmim.ops.backends import NAMES, operations
from fastmim.ops.extension import load_extension

USAGE = (
    "usage: python -m fastmim.info\n\nPrints versions, devices and, for each operation, its backends. Takes no options."
)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _apex() -> str:
    """NVIDIA's apex has FusedLAMB and amp_C; the package of that name on PyPI is another project."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    found = importlib.util.find_spec("amp_C") is not None and importlib.util.find_spec("apex.optimizers") is not None
    return "NVIDIA's, with fused optimisers" if found else "installed, but it is not NVIDIA's apex with fused kernels"


def _dali() -> str:
    names = [d.metadata["Name"] for d in metadata.distributions() if str(d.metadata["Name"]).startswith("nvidia-dali")]
    return f"{names[0]} {_version(names[0])}" if names else "not installed"


def machine() -> list[tuple[str, str]]:
    """(what, fact) pairs about this installation."""
    facts = [
        ("fastmim", f"{fastmim.__version__} from {os.path.dirname(fastmim.__file__)}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _version("triton")),
        ("xformers", _version("xformers")),
        ("apex", _apex()),
        ("DALI", _dali()),
    ]
    extension, reason = load_extension()
    if extension is None:
        facts.append(("fastmim._C", f"not available: {reason}"))
    else:
        build = extension.build_info()
        openmp = "with OpenMP" if build["openmp"] else "one thread (no OpenMP at build time)"
        facts.append(("fastmim._C", f"CPU kernels for {build['compiled_for']}, running {build['isa']}, {openmp}"))
        facts.append(("CUDA kernels", build["cuda"] + (f"; {build['cuda_error']}" if build["cuda_error"] else "")))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            capability = f"sm_{properties.major}{properties.minor}"
            facts.append((f"cuda:{i}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"))
    else:
        facts.append(("GPU", "none that torch can use"))
    return facts


def backends() -> list[tuple[str, str, str, dict[str, str]]]:
    """(operation, device type, chosen backend, {other backend: why not}) for every operation and device here."""
    rows = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for op, stations in operations().items():
            chosen = stations.choose(torch.device(device))
            others = {
                name: stations.why_not(name, device) or "can run, is not the first choice here"
                for name in NAMES
                if name != chosen
            }
            rows.append((op, device, chosen, others))
    return rows


def main(argv: list[str]) -> int:
    if argv:
        wants_help = argv in (["-h"], ["--help"])
        print(
            USAGE if wants_help else f"fastmim.info: unknown option {argv[0]!r}\n{USAGE}",
            file=None if wants_help else sys.stderr,
        )
        return 0 if wants_help else 2
    for what, fact in machine():
        print(f"{what:14}{fact}")
    wanted = os.environ.get("FASTMIM_BACKEND")
    if wanted:
        print(f"\nFASTMIM_BACKEND={wanted} asks every operation for that backend; an operation without it will fail.")
    print("\noperation, tensors on -> backend")
    os.environ.pop("FASTMIM_BACKEND", None)
    for op, device, chosen, others in backends():
        print(f"  {op}, {device} -> {chosen}")
        for name, reason in others.items():
            print(f"      not {name}: {reason}")
    return 0


if __name__ == "__main__":
    with while_output_is_read():
        sys.exit(main(sys.argv[1:]))
