"""Triton kernels, one file an operation, imported only where Triton is.

Every file lists what it ships in AHEAD_OF_TIME: the gate of the tests compiles each entry for sm_80, sm_90 and sm_100.
"""
