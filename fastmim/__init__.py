"""fastmim: fast pre-training of vision encoders by masked image modeling."""

__version__ = "0.1.0"
