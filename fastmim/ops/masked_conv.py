"""Convolution that computes only what is visible: k x k over tiles, neighbours found through the tile index.

Legend: B batch, K visible cells, t tile side, s stride, C input and O output channels, k kernel side.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmim.ops.backends import Backends, compiled, is_observed
from fastmim.ops.tile_index import TileIndex
from fastmim.ops.tiles import check_tiles, gather_tiles_ref, scatter_tiles_ref

__all__ = ["DENSE_KERNELS", "DEPTHWISE_KERNELS", "masked_conv2d", "masked_conv2d_ref", "multiplies_rows_faster"]

DENSE_KERNELS = (1, 3, 5, 7)
DEPTHWISE_KERNELS = (3, 5, 7)
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/element.h numbers them
_dtypes: dict[str, Iterable[torch.dtype]] = dict.fromkeys(("cpu", "triton", "cuda"), ELEMENTS)
_backends = {
    "masked_depthwise": Backends(
        "masked_depthwise",
        cpu="masked_depthwise_gradients",
        triton="fastmim.kernels.masked_conv",
        cuda="masked_depthwise_cuda",
        dtypes=_dtypes,
    ),
    "masked_dense": Backends("masked_dense", cpu="masked_dense", triton="fastmim.kernels.masked_conv", dtypes=_dtypes),
}


def masked_conv2d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: TileIndex, stride: int = 1, groups: int = 1
) -> Tensor:
    """What the operation means, in plain PyTorch: the dense convolution with masked inputs as zeros and masked outputs
    dropped. Any device, any dtype, differentiable."""
    bias = None if bias is None else bias.to(x.dtype)
    padding = weight.shape[-1] // 2
    dense = F.conv2d(scatter_tiles_ref(x, tiles), weight.to(x.dtype), bias, stride, padding, groups=groups)
    return gather_tiles_ref(dense, tiles)


def _output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """[B, K, t / s, t / s, O], not yet written."""
    batch, count, side, _, _ = x.shape
    return x.new_empty((batch, count, side // stride, side // stride, weight.shape[0]))


def _elements(x: Tensor, weight: Tensor) -> tuple[int, int]:
    return ELEMENTS[x.dtype], ELEMENTS[weight.dtype]


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Family:
    """One of the two kinds of convolution, as registered operators that share their signatures:

    fastmim::NAME                    (x, weight, bias, neighbours, stride, backend) -> out
    fastmim::NAME_input_gradient     (gradient of out, weight, neighbours, stride, backend) -> gradient of x
    fastmim::NAME_weight_gradient    (gradient of out, x, weight, neighbours, stride, with_bias, backend) -> gradients
                                     of weight and bias, in the dtype of weight; empty without bias
    fastmim::NAME_gradients          (the same) -> gradients of x, weight and bias, in one pass where a kernel has it

    `gradient` is contiguous tiles [B, K, t / s, t / s, O]; x, weight, bias and neighbours are contiguous.
    """

    def __init__(self, name: str) -> None:
        self.name, self.depthwise = name, name == "masked_depthwise"
        define, implement = torch.library.define, torch.library.impl
        last = "Tensor neighbours, int stride, str backend"
        define(f"fastmim::{name}", f"(Tensor x, Tensor weight, Tensor? bias, {last}) -> Tensor")
        define(f"fastmim::{name}_input_gradient", f"(Tensor gradient, Tensor weight, {last}) -> Tensor")
        define(
            f"fastmim::{name}_weight_gradient",
            "(Tensor gradient, Tensor x, Tensor weight, Tensor neighbours, int stride, bool with_bias, str backend)"
            " -> (Tensor, Tensor)",
        )
        define(
            f"fastmim::{name}_gradients",
            "(Tensor gradient, Tensor x, Tensor weight, Tensor neighbours, int stride, bool with_bias, str backend)"
            " -> (Tensor, Tensor, Tensor)",
        )
        functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            name: (self.forward, self.fake_forward),
            f"{name}_input_gradient": (self.input_gradient, self.fake_input_gradient),
            f"{name}_weight_gradient": (self.weight_gradient, self.fake_weight_gradient),
            f"{name}_gradients": (self.gradients, self.fake_gradients),
        }
        for op, (function, fake) in functions.items():
            implement(f"fastmim::{op}", ("cpu", "cuda"))(function)
            torch.library.register_fake(f"fastmim::{op}")(fake)
        torch.library.register_autograd(f"fastmim::{name}", self.differentiate, setup_context=self.save)
        self.operator = getattr(torch.ops.fastmim, name).default
        self.gradient_operators = tuple(
            getattr(torch.ops.fastmim, name + kind).default
            for kind in ("_gradients", "_input_gradient", "_weight_gradient")
        )

    def shape(self, x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
        """B, K, t, C, (O,) k, s, as the compiled kernels take it."""
        channels = (x.shape[4],) if self.depthwise else (x.shape[4], weight.shape[0])
        return *x.shape[:3], *channels, weight.shape[2], stride

    def run(self, kind: str, backend: str, shape: tuple[int, ...], *arguments: int, on: Tensor) -> None:
        """Calls the compiled kernel. One on CUDA is also given room to work in and the stream."""
        if backend == "cpu":
            getattr(compiled(), self.name + kind)(shape, *arguments)
            return
        floats = compiled().masked_depthwise_cuda_room(shape, kind == "_weight_gradient")
        room = on.new_empty((floats,), dtype=torch.float32)
        stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else 0
        with torch.cuda.device_of(on):
            getattr(compiled(), f"{self.name}{kind}_cuda")(shape, *arguments, room.data_ptr(), stream)

    def triton(self, kind: str) -> Callable[..., None]:
        return getattr(_backends[self.name].triton(), self.name + kind)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, stride: int, backend: str
    ) -> Tensor:
        x, weight, out = x.contiguous(), weight.contiguous(), _output(x, weight, stride)
        bias = None if bias is None else bias.to(weight.dtype).contiguous()
        if backend == "triton":
            self.triton("")(x, weight, bias, neighbours, stride, out)
            return out
        self.run(
            "",
            backend,
            self.shape(x, weight, stride),
            neighbours.data_ptr(),
            *_elements(x, weight),
            x.data_ptr(),
            weight.data_ptr(),
            _pointer(bias),
            out.data_ptr(),
            on=x,
        )
        return out

    def input_gradient(self, gradient: Tensor, weight: Tensor, neighbours: Tensor, stride: int, backend: str) -> Tensor:
        gradient, weight = gradient.contiguous(), weight.contiguous()
        x_gradient = self.fake_input_gradient(gradient, weight, neighbours, stride, backend)
        if backend == "triton":
            self.triton("_input_gradient")(gradient, weight, neighbours, stride, x_gradient)
            return x_gradient
        self.run(
            "_input_gradient",
            backend,
            self.shape(x_gradient, weight, stride),
            neighbours.data_ptr(),
            *_elements(gradient, weight),
            gradient.data_ptr(),
            weight.data_ptr(),
            x_gradient.data_ptr(),
            on=gradient,
        )
        return x_gradient

    def weight_gradient(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        neighbours: Tensor,
        stride: int,
        with_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        gradient, x = gradient.contiguous(), x.contiguous()
        weight_gradient, bias_gradient = self.fake_weight_gradient(gradient, x, weight, neighbours, stride, with_bias)
        if backend == "triton":
            with_it = bias_gradient if with_bias else None
            self.triton("_weight_gradient")(gradient, x, neighbours, stride, weight_gradient, with_it)
            return weight_gradient, bias_gradient
        self.run(
            "_weight_gradient",
            backend,
            self.shape(x, weight, stride),
            neighbours.data_ptr(),
            *_elements(x, weight),
            gradient.data_ptr(),
            x.data_ptr(),
            weight_gradient.data_ptr(),
            _pointer(bias_gradient) if with_bias else 0,
            on=x,
        )
        return weight_gradient, bias_gradient

    def gradients(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        neighbours: Tensor,
        stride: int,
        with_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if backend != "cpu" or not self.depthwise:
            x_gradient = self.input_gradient(gradient, weight, neighbours, stride, backend)
            return x_gradient, *self.weight_gradient(gradient, x, weight, neighbours, stride, with_bias, backend)
        gradient, x, weight = gradient.contiguous(), x.contiguous(), weight.contiguous()
        results = self.fake_gradients(gradient, x, weight, neighbours, stride, with_bias)
        compiled().masked_depthwise_gradients(
            self.shape(x, weight, stride),
            neighbours.data_ptr(),
            *_elements(x, weight),
            gradient.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            results[0].data_ptr(),
            results[1].data_ptr(),
            _pointer(results[2]) if with_bias else 0,
        )
        return results

    @staticmethod
    def fake_forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, stride: int, backend: str
    ) -> Tensor:
        return _output(x, weight, stride)

    def fake_input_gradient(
        self, gradient: Tensor, weight: Tensor, neighbours: Tensor, stride: int, backend: str
    ) -> Tensor:
        batch, count, side, _, _ = gradient.shape
        channels = weight.shape[0 if self.depthwise else 1]
        return gradient.new_empty((batch, count, side * stride, side * stride, channels))

    @staticmethod
    def fake_weight_gradient(
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        neighbours: Tensor,
        stride: int,
        with_bias: bool,
        backend: str = "",
    ) -> tuple[Tensor, Tensor]:
        bias = weight.new_empty((weight.shape[0] if with_bias else 0,))
        return weight.new_empty(weight.shape), bias

    def fake_gradients(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        neighbours: Tensor,
        stride: int,
        with_bias: bool,
        backend: str = "",
    ) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty(x.shape), *self.fake_weight_gradient(gradient, x, weight, neighbours, stride, with_bias)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, neighbours, ctx.stride, ctx.backend = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, neighbours)

    def differentiate(self, ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return self.all_gradients(ctx, gradient, *self.gradient_operators)

    @staticmethod
    def all_gradients(
        ctx: Any,
        gradient: Tensor,
        both: Callable[..., Any],
        of_input: Callable[..., Any],
        of_weight: Callable[..., Any],
    ) -> tuple[Tensor | None, ...]:
        """Of every argument of the operator, by the functions given."""
        x, weight, neighbours = ctx.saved_tensors
        x_gradient = weight_gradient = bias_gradient = None
        wants_x, wants_weight, with_bias = ctx.needs_input_grad[:3]
        last = (neighbours, ctx.stride, with_bias, ctx.backend)
        if wants_x and (wants_weight or with_bias):
            x_gradient, weight_gradient, bias_gradient = both(gradient, x, weight, *last)
        elif wants_x:
            x_gradient = of_input(gradient, weight, neighbours, ctx.stride, ctx.backend)
        elif wants_weight or with_bias:
            weight_gradient, bias_gradient = of_weight(gradient, x, weight, *last)
        if with_bias and bias_gradient is not None:
            bias_gradient = bias_gradient.to(ctx.bias_dtype)
        return x_gradient, weight_gradient, bias_gradient if with_bias else None, None, None, None

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, stride: int, backend: str
    ) -> Tensor:
        if is_observed(x):
            return self.operator(x, weight, bias, neighbours, stride, backend)
        return _Direct.apply(x, weight, bias, neighbours, stride, backend, self)  # type: ignore[no-any-return]


class _Direct(torch.autograd.Function):
    """The operator and its gradient without the dispatcher, whose three rounds take as long as the kernels of small
    maps do: on CPUs 0.2 of 0.6 ms where nothing of it is in the caches."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, family = arguments
        ctx.family = family
        output: Tensor = family.forward(*inputs)
        family.save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        family = ctx.family
        functions = family.gradients, family.input_gradient, family.weight_gradient
        return *family.all_gradients(ctx, gradient, *functions), None


_families = {name: _Family(name) for name in _backends}


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: TileIndex,
    stride: int = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """k x k convolution of the visible part of a feature map, padding k // 2.

    Equal to the dense convolution of the map whose masked cells are zero, at the visible cells; masked cells are
    neither read nor computed, and a tap that falls on one costs nothing.

    Args:
        x: [B, K, t, t, C] tiles, floating point.
        weight: [O, C / groups, k, k] as nn.Conv2d has it; k is 1, 3, 5 or 7 (depthwise: 3, 5 or 7).
        bias: [O] or None.
        tiles: the visible cells.
        stride: 1, or 2 where t is even.
        groups: 1, or C = O for a depthwise convolution.
        backend: "reference", "cpu", "triton", or "cuda" (depthwise only); chosen by device when None.

    Returns:
        [B, K, t / s, t / s, O] in the dtype of `x`, accumulated in fp32 (fp64 in fp64, which the reference computes).
        Under autocast `x` is cast first, as for nn.Conv2d; a weight of higher precision than `x` is used as it is by
        the kernels (a dense Triton kernel rounds it to the dtype of `x`, as nn.Conv2d does). Differentiable with
        respect to `x`, `weight` and `bias`; the gradients are deterministic.

    Raises:
        ValueError: shapes or options that do not fit, naming both; or a backend asked for by name that cannot run,
            with its reason.

    Source: the meaning is SparK's (arXiv 2301.03580, section 3.1), which computes it densely; the layout is ours.
    """
    _check(x, weight, bias, tiles, stride, groups)
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    op = "masked_dense" if groups == 1 else "masked_depthwise"
    chosen = _backends[op].choose(x.device, x.dtype, backend)
    if chosen == "reference":
        return masked_conv2d_ref(x, weight, bias, tiles, stride, groups)
    return _families[op](x, weight, bias, tiles.neighbours, stride, chosen)


def multiplies_rows_faster(x: Tensor) -> bool:
    """Is a 1x1 convolution of `x` better done by `masked_conv2d` than by F.linear?

    On CPUs in fp32: its register-tiled product is faster than torch's there, and a stride needs no copy. In half
    precision, and on a GPU, torch's own product uses the matrix units.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return _backends["masked_dense"].choose(x.device, x.dtype) == "cpu"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: TileIndex, stride: int, groups: int) -> None:
    """Raises ValueError in the caller's terms."""
    op = "masked_conv2d"
    check_tiles(op, x, tiles)
    channels, side = x.shape[4], x.shape[2]
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{op}: weight must be [O, C / groups, k, k], got {list(weight.shape)}")
    out_channels, in_channels, k, _ = weight.shape
    if groups != 1 and not groups == channels == out_channels:
        raise ValueError(
            f"{op}: groups is {groups}; it must be 1, or equal to the input channels ({channels}) and the output "
            f"channels ({out_channels}) for a depthwise convolution"
        )
    if in_channels * groups != channels:
        raise ValueError(
            f"{op}: weight expects {in_channels * groups} input channels, x has {channels} (x: {list(x.shape)})"
        )
    kernels = DENSE_KERNELS if groups == 1 else DEPTHWISE_KERNELS
    if k not in kernels:
        raise ValueError(f"{op}: a {k} x {k} kernel is not supported with groups={groups}; k is one of {kernels}")
    if stride not in (1, 2) or side % stride:
        raise ValueError(
            f"{op}: stride is {stride} with tiles of {side} x {side}; it must be 1, or 2 with an even side"
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"{op}: bias is {list(bias.shape)}, weight has {out_channels} output channels")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: x and {name} must share a device, got {x.device} and {tensor.device}")
