"""Writing safetensors files straight to disk: one tensor in memory at a time, checksum on the way, synced at the end.

The format: 8 bytes little-endian length of the header; the header, JSON {name: {dtype, shape, data_offsets}} padded
with spaces to a multiple of 8; the tensors' bytes. `safetensors.torch.save_file` writes the same but builds the whole
file in memory first and syncs nothing.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, int | str]:
    """Write and sync `path`, with `metadata` in its header; returns {"bytes": its size, "sha256": of its content}.

    Raises:
        ValueError: a value that is no dense tensor of a dtype that the format knows.
        OSError: the disk refuses.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            what = f"{tensor.dtype} {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: a {what} cannot be saved; dense tensors of {', '.join(_DTYPES.values())} can")
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(len(header).to_bytes(8, "little"))
        put(header)
        for name in names:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            put(flat.view(torch.uint8).numpy().data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}
