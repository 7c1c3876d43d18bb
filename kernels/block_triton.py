"""A whole block on Triton in four launches or two more: product, convolution, scan, product.

Registered as torch.ops.mamba2_apps.mamba2_block_triton, without gradients. `block.py` says what the
op computes.

Dimension legend: batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · d_model d
"""

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import block_products_triton as products
from . import causal_conv1d_triton
from .block import check
from .conv_ssd_norm_triton import _Sizes
from .dispatch import is_plain
from .launching import Launch, Prepared, on, prepare
from .ssd_triton_launch import ChunkedForward, Forward
from .ssd_triton_plan import stores_states
from .weights_triton import Cast

INPUTS = (
    "residual", "norm_weight", "in_proj", "conv_weight", "conv_bias", "dt_bias", "A", "D",
    "gate_norm_weight", "out_proj", "lengths", "cu_seqlens",
)  # fmt: skip
ALIGNMENT = 128  # bytes


class _Block(Prepared):
    """The launches of a block, and where each tensor of theirs lies.

    What they hand on to one another is in one workspace, whose tensors are made for Triton's first
    look alone: an allocation, or a view, takes the host as long as a small launch.
    """

    def __init__(
        self, tensors: tuple[Any, ...], p: int, g: int, n: int, low: float, high: float, eps: float,
        gate_eps: float, dtype: torch.dtype, tiles: tuple[products.Tiles, products.Tiles, int],
    ) -> None:  # fmt: skip
        check(tensors, p, g, n, (low, high), dtype)
        given = dict(zip(INPUTS, tensors, strict=True))
        residual, in_proj, out_proj = (given[k] for k in ("residual", "in_proj", "out_proj"))
        super().__init__(residual.device)
        self.sizes = sizes = _Sizes(given["A"].shape[-1], p, g, n, given["A"].dim())
        (b, l, _), self.inner = residual.shape, out_proj.shape[1]
        self.channels = given["conv_weight"].shape[0]
        self.casts = not in_proj.dtype == out_proj.dtype == dtype
        self.bytes = 0
        self.parts: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        if self.casts:
            self._reserve("weights", dtype, in_proj.numel() + out_proj.numel())
        self._reserve("rows", dtype, b, l, products.row_length(in_proj.shape[0] - self.inner))
        self._reserve("mixed", dtype, b, l, self.channels)
        self._reserve("y", dtype, b, l, sizes.h, p)

        gate, out_weight = ("weights", "out_weight") if self.casts else ("in_proj", "out_proj")
        at = given | self._between(in_proj, self.workspace(residual))
        first, second, many = tiles
        product_in = products.NormLinear(
            residual, at["in_weight"], at["rows"], self.channels, eps, first, many
        )
        convolution = causal_conv1d_triton._Forward(
            (at["xBC"], at["conv_weight"], None, None, at["cu_seqlens"], None, None), True, False
        )
        scanned = (
            *(at[k] for k in ("x", "dt", "A", "B", "C", "D")), None, at["dt_bias"], None,
            at["cu_seqlens"],
        )  # fmt: skip
        design = ChunkedForward if stores_states(sizes.directions, n) else Forward
        scan = design(scanned, (True, low, high, False), False, False)
        if scan.floats:
            self._reserve("scratch", torch.float32, scan.floats)
        self.first_state = scan.states
        product_out = products.GatedLinear(residual, at[out_weight], eps, gate_eps, second)

        workspace = self.workspace(residual)
        between = self._between(in_proj, workspace)
        # Which address each of them counts from: the workspace's, which follows the inputs'.
        self.places = {k: (-1, t.data_ptr() - workspace.data_ptr()) for k, t in between.items()}
        if not self.casts:
            offset = between["in_weight"].data_ptr() - in_proj.data_ptr()
            self.places["in_weight"] = INPUTS.index("in_proj"), offset
        # What the scan is not given it never reads, but it wants an address.
        there = {k for k, t in given.items() if t is not None} | between.keys()
        D, bounds, scratch, states = (
            k if k in there else "y" for k in ("D", "cu_seqlens", "scratch", "states")
        )
        self.launches = []
        if self.casts:
            self.launches += self._of(Cast(in_proj, out_proj), "in_proj", "out_proj", "weights")
        self.launches += [
            *self._of(product_in, "residual", "norm_weight", "in_weight", "lengths", "rows"),
            *self._of(convolution, "xBC", "conv_weight", "conv_bias", "nothing", "cu_seqlens",
                      "mixed", "nothing"),
            *self._of(scan, "x", "dt", "A", "B", "C", D, "y", "dt_bias", "y", bounds, "y", "y", "y",
                      scratch, states),
            *self._of(product_out, "y", "residual", "norm_weight", gate, "gate_norm_weight",
                      out_weight, "out"),
        ]  # fmt: skip

    def _reserve(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        self.parts[name] = self.bytes, dtype, shape
        size = math.prod(shape) * dtype.itemsize
        self.bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def workspace(self, residual: Tensor) -> Tensor:
        return torch.empty(self.bytes // 4, dtype=torch.float32, device=residual.device)

    def _between(self, in_proj: Tensor, workspace: Tensor) -> dict[str, Tensor]:
        """What lies between inputs and output, by name: parts of the workspace, and views."""
        flat, found = workspace.view(torch.uint8), {}
        for name, (first, dtype, shape) in self.parts.items():
            size = math.prod(shape) * dtype.itemsize
            found[name] = flat[first : first + size].view(dtype).view(shape)
        weight = in_proj
        if self.casts:
            weight = found["weights"][: in_proj.numel()].view(in_proj.shape)
            rest = found["weights"][in_proj.numel() :]
            found["out_weight"] = rest.view(in_proj.shape[1], self.inner)
        found["in_weight"] = weight[self.inner :]
        found["xBC"] = found["rows"].narrow(2, 0, self.channels)
        found["dt"] = _step_sizes(found["rows"], self.channels, self.sizes)
        found["x"], found["B"], found["C"] = self.sizes.split(found["mixed"])
        if "scratch" in found:
            found["states"] = found["scratch"][self.first_state :].view(found["y"].dtype)
        return found

    def _of(self, call: Prepared, *names: str) -> list[Launch]:
        """A call's launches, on tensors of the block by these names."""
        order = [*INPUTS, *self.places, "out", "nothing"]
        index = [order.index(name) for name in names]
        return [
            launch._replace(tensors=itemgetter(*launch.tensors(index))) for launch in call.launches
        ]

    def __call__(self, inputs: Sequence[Tensor | None]) -> Tensor:
        residual: Any = inputs[0]
        workspace, out = self.workspace(residual), torch.empty_like(residual)
        given = [None if t is None else t.data_ptr() for t in inputs]
        bases: list[Any] = [*given, workspace.data_ptr()]
        between = [bases[base] + offset for base, offset in self.places.values()]

        pointers = [*given, *between, out.data_ptr(), None]
        self.run_at(pointers, lambda: self.tensors(inputs, workspace, out))
        return out

    def tensors(
        self, inputs: Sequence[Tensor | None], workspace: Tensor, out: Tensor
    ) -> list[Tensor | None]:
        """All that the launches choose from."""
        in_proj: Any = inputs[INPUTS.index("in_proj")]
        return [*inputs, *self._between(in_proj, workspace).values(), out, None]


def _forward(*inputs: Any) -> Tensor:
    """The op's arguments, in its schema's order."""
    tensors, settings = inputs[: len(INPUTS)], inputs[len(INPUTS) :]
    tensors = tuple(t if t is None or t.is_contiguous() else t.contiguous() for t in tensors)
    with on(tensors[0].device):
        tiles = products.NORM_LINEAR, products.GATED_LINEAR, products.MANY_PROGRAMS
        return prepare(_Block, tensors, *settings, tiles)(tensors)


def _step_sizes(rows: Tensor, first: int, sizes: _Sizes) -> Tensor:
    """dt (b, l, h), or (2, b, l, h), in the columns of `rows` from `first`: a view."""
    b, l, e = rows.shape
    if sizes.directions == 1:
        return rows.narrow(2, first, sizes.h)
    return rows.as_strided((2, b, l, sizes.h), (sizes.h, l * e, e, 1), first)


torch.library.define(
    "mamba2_apps::mamba2_block_triton",
    "(Tensor residual, Tensor norm_weight, Tensor in_proj, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor dt_bias, Tensor A, Tensor? D, Tensor gate_norm_weight, Tensor out_proj, "
    "Tensor? lengths, Tensor? cu_seqlens, SymInt headdim, SymInt ngroups, SymInt d_state, "
    "float low, float high, float eps, float gate_eps, ScalarType dtype) -> Tensor",
)
torch.library.impl("mamba2_apps::mamba2_block_triton", ("cpu", "cuda"))(_forward)


@torch.library.register_fake("mamba2_apps::mamba2_block_triton")
def _(residual, *rest) -> Tensor:
    return residual.new_empty(residual.shape)


def mamba2_block(*inputs: Any) -> Tensor:
    """`kernels.mamba2_block` on checked arguments, in the order of `_forward`."""
    run = _forward if is_plain(*inputs[:12]) else torch.ops.mamba2_apps.mamba2_block_triton
    return run(*inputs)
