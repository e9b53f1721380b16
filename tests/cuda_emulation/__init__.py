"""Runs csrc/cuda on the host, without a GPU and without nvcc: see cuda_emulation.h."""

EMULATED = ("masked_depthwise",)
"""Operations whose CUDA kernels the tests run so."""
