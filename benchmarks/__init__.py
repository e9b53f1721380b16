"""Speed and memory of fastmim against the plain PyTorch way, measured side by side. Start at benchmarks/README.md."""
