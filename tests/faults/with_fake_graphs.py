"""The training command with graphs that are emulated on a CPU: python -m tests.faults.with_fake_graphs --out ... .

`tests.engine.fake_graph` bakes in what CUDA graphs bake in and refuses what they refuse.
"""

import functools
import sys

from fastmim.command_line import command
from fastmim.engine import capture, trainer
from fastmim.train import main
from tests.engine.fake_graph import FakeGraphs

if __name__ == "__main__":
    capture.CudaGraphs = lambda device: FakeGraphs()  # type: ignore[assignment,misc]
    capture.why_no_graph = lambda wanted, *_, **__: "engine.graph is off" if wanted == "off" else ""
    trainer.create_optimizer = functools.partial(trainer.create_optimizer, rates_on_device=True)
    command(main, sys.argv[1:])
