"""The Mamba-2 block: projection, short convolution, state space duality, gated norm, projection.

Follows Dao and Gu, "Transformers are SSMs" (2024), section 7, with the parameter names and shapes
of mamba_ssm's Mamba2, so that its checkpoints load. The bidirectional form is our own.

batch b · seqlen l · nheads h · headdim p · ngroups g · dstate n · d_model d
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2_apps import few_tokens, kernels
from mamba2_apps.checks import check_call, has_hooks, is_count, is_linear, require
from mamba2_apps.kernels import causal_conv1d, conv_ssd_norm, gated_rms_norm, mamba2_block, ssd_step
from mamba2_apps.kernels.block import DT_OF_PADDING, why_not_served
from mamba2_apps.kernels.dispatch import HALF, autocast_dtype, resolve_backend
from mamba2_apps.padding import LeftAligned, data_positions

if TYPE_CHECKING:
    from mamba2_apps.parallel import ContextParallel


class Mamba2State(NamedTuple):
    """What a causal Mamba2 carries from one piece of a sequence to the next."""

    conv: Tensor  # (b, d_conv - 1, conv_dim) the convolution's last inputs
    ssm: Tensor  # (b, h, p, n) float32, or float64 in a float64 model


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels beside a SiLU gate; weight (width,). See gated_rms_norm."""

    def __init__(
        self,
        width: int,
        group_size: int,
        *,
        eps: float = 1e-5,
        norm_before_gate: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(
            x,
            self.weight,
            z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )


class Mamba2(nn.Module):
    """A Mamba-2 mixer, causal or bidirectional.

    Bidirectional: in_proj, D, norm and out_proj serve both directions; each has its own step sizes
    and decays, so in_proj ends with two sets of dt (forward, reverse), and dt_bias and A_log are
    (2, h). Both scans run in one `ssd_bidirectional` call and are summed before the gate. By
    default one causal convolution serves both scans: x, B and C are then the same tensors, C·Bᵀ is
    computed once for two directions, and the forward half is the causal mixer as it is, so that a
    causal checkpoint can start both directions. Its window looks back only; what follows a token
    reaches it through the reverse scan. `conv_per_direction=True` gives each scan a convolution of
    its own in its own order, as Vision Mamba has, and then x, B and C exist twice.

    Args:
        d_model: width of the input and the output.
        d_state: state size n of a head's channel.
        d_conv: width of the causal convolution.
        expand: inner width over d_model.
        headdim: channels p of a head.
        ngroups: groups of heads that share B and C.
        d_ssm: inner channels that pass through the state space; the rest form a gated MLP. None:
            all.
        conv_init: the convolution's weights start uniform in ±conv_init. None: torch's default.
        A_init_range: -A starts uniform in this range.
        D_has_hdim: one D per channel instead of one per head.
        rmsnorm: normalise the output beside the gate; without it the gate stands alone.
        norm_before_gate: norm(y) * silu(z) instead of norm(y * silu(z)).
        norm_eps: the gated norm's epsilon.
        dt_min: least step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: step sizes below this are raised to it at the start.
        dt_limit: range that step sizes are clamped to.
        bias: biases in in_proj and out_proj.
        conv_bias: a bias in the convolution.
        bidirectional: scan both ways.
        conv_per_direction: a convolution for each direction; for bidirectional mixers only.
        device: where the parameters lie.
        dtype: the parameters' type. A_log, D and dt_bias start as float32 whatever it is; `.to()`
            converts them like any other, and they are used in float32 at least.

    Raises:
        ValueError: a value that no mixer can have; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        d_ssm: int | None = None,
        conv_init: float | None = None,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        bidirectional: bool = False,
        conv_per_direction: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "d_model": d_model,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "headdim": headdim,
            "ngroups": ngroups,
        }
        for name, value in sizes.items():
            require(is_count(value), name, value, "an integer of at least 1")
        d_inner = expand * d_model
        d_ssm = d_inner if d_ssm is None else d_ssm
        require(
            is_count(d_ssm) and d_ssm <= d_inner,
            "d_ssm",
            d_ssm,
            f"an integer from 1 to expand * d_model = {d_inner}, or None",
        )
        require(
            d_ssm % headdim == 0,
            "headdim",
            headdim,
            f"a divisor of {d_ssm}, the channels that pass through the state space",
        )
        nheads = d_ssm // headdim
        require(nheads % ngroups == 0, "ngroups", ngroups, f"a divisor of the {nheads} heads")
        require(0 < dt_min <= dt_max, "dt_min", dt_min, f"above 0 and at most dt_max={dt_max!r}")
        require(dt_init_floor > 0, "dt_init_floor", dt_init_floor, "above 0")
        require(
            len(dt_limit) == 2 and 0 <= dt_limit[0] < dt_limit[1],
            "dt_limit",
            dt_limit,
            "(low, high) with 0 <= low < high",
        )
        require(
            len(A_init_range) == 2 and 0 < A_init_range[0] <= A_init_range[1],
            "A_init_range",
            A_init_range,
            "(low, high) with 0 < low <= high",
        )
        require(conv_init is None or conv_init > 0, "conv_init", conv_init, "above 0, or None")
        require(norm_eps > 0, "norm_eps", norm_eps, "above 0")
        require(
            bidirectional or not conv_per_direction,
            "conv_per_direction",
            conv_per_direction,
            "False unless bidirectional=True",
        )

        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.headdim = headdim
        self.ngroups = ngroups
        self.nheads = nheads
        self.d_ssm = d_ssm
        self.conv_dim = d_ssm + 2 * ngroups * d_state
        self.conv_init = conv_init
        self.A_init_range = tuple(A_init_range)
        self.D_has_hdim = D_has_hdim
        self.dt_init = (dt_min, dt_max, dt_init_floor)
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.bidirectional = bidirectional
        self.conv_per_direction = conv_per_direction
        # Set by `mamba2_apps.parallel.split_sequence`.
        self.context_parallel: ContextParallel | None = None

        directions = 2 if bidirectional else 1
        heads_shape = (2, nheads) if bidirectional else (nheads,)
        d_mlp = d_inner - d_ssm
        # The order of in_proj's outputs: the MLP's gate and value, z, x, B, C, dt.
        self._split_sizes = [d_mlp, d_mlp] if d_mlp else []
        self._split_sizes += [d_ssm, self.conv_dim, directions * nheads]
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, sum(self._split_sizes), bias=bias, **kwargs)
        # Only its parameters are used: the convolution runs channels-last through causal_conv1d.
        self.conv1d = nn.Conv1d(
            self.conv_dim,
            self.conv_dim * (2 if conv_per_direction else 1),
            d_conv,
            groups=self.conv_dim,
            bias=conv_bias,
            **kwargs,
        )
        self.dt_bias = nn.Parameter(torch.empty(heads_shape, device=device, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(heads_shape, device=device, dtype=torch.float32))
        self.D = nn.Parameter(
            torch.empty(d_ssm if D_has_hdim else nheads, device=device, dtype=torch.float32)
        )
        self.norm = (
            GatedRMSNorm(
                d_ssm, d_ssm // ngroups, eps=norm_eps, norm_before_gate=norm_before_gate, **kwargs
            )
            if rmsnorm
            else None
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **kwargs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws dt_bias and A_log anew, sets D to 1; the submodules reset themselves."""
        dt_min, dt_max, dt_floor = self.dt_init
        with torch.no_grad():
            # Step sizes log-uniform in [dt_min, dt_max]; the bias is their inverse softplus.
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            dt = dt.clamp(min=dt_floor)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*self.A_init_range).log())
            self.D.fill_(1.0)
            if self.conv_init is not None:
                self.conv1d.weight.uniform_(-self.conv_init, self.conv_init)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"A_log", "dt_bias", "D"}

    def init_state(self, batch_size: int) -> Mamba2State:
        """The state before any token, for a batch of batch_size rows (or packed sequences)."""
        self._require_causal("init_state")
        weight = self.in_proj.weight
        conv = weight.new_zeros(batch_size, self.d_conv - 1, self.conv_dim)
        ssm = torch.zeros(
            (batch_size, self.nheads, self.headdim, self.d_state),
            device=weight.device,
            dtype=_at_least_float32(weight.dtype),
        )
        return Mamba2State(conv, ssm)

    def forward(
        self,
        u: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Mamba2State | None = None,
        return_state: bool = False,
    ) -> Any:
        """Mixes along the sequence.

        Args:
            u: (b, l, d_model), or (1, total, d_model) with cu_seqlens.
            mask: (b, l) bool, True where there is data, one run in a row. Outputs at data are those
                of the row without its padding, whatever padding holds; 0 at padding.
            lengths: (b,) integers, in place of mask where every row's data come first and its
                padding is finite: the first lengths[i] tokens of row i are data. Outputs at padding
                are arbitrary but finite.
            cu_seqlens: (nseq + 1,) int32, where packed sequences begin and end.
            state: what came before, from `init_state` or an earlier call; it is not modified.
                Causal mixers only.
            return_state: also return the state after the last data token of each row or sequence.

        Returns:
            (b, l, d_model), or that and a Mamba2State.

        Raises:
            ValueError: more than one of mask, lengths and cu_seqlens; a state asked of a
                bidirectional mixer; shapes or types that do not fit.
        """
        check_call(u, self.d_model, mask, lengths, cu_seqlens)
        if state is not None or return_state:
            self._require_causal("state" if state is not None else "return_state")
        if mask is None:
            out, final_state = self._mix(u, lengths, cu_seqlens, state, return_state)
        else:
            rows = LeftAligned(mask, *u.shape[:2])
            out, final_state = self._mix(rows.align(u), rows.lengths, None, state, return_state)
            out = rows.restore(out)
        return (out, final_state) if return_state else out

    def step(self, u: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One token: u (b, d_model) and a state to (b, d_model) and the state after it."""
        self._require_causal("step")
        if few_tokens.serves(self, u[:, None]):
            y, *after = few_tokens.FewTokens(self).mix(u[:, None], *state)
            return y[:, 0], Mamba2State(*after)
        *mlp, z, xBC, dt = self.in_proj(u).split(self._split_sizes, dim=-1)
        xBC, window = causal_conv1d(
            xBC[:, None],
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_states=state.conv,
            return_final_states=True,
        )
        x, B, C = self._split_conv(xBC[:, 0])
        y, ssm_state = ssd_step(
            state.ssm,
            x,
            dt,
            self._decay_rates(),
            B,
            C,
            D=self._skip(),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        return self._project_out(y, z, mlp), Mamba2State(window, ssm_state)

    def _mix(
        self,
        u: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        state: Mamba2State | None,
        return_state: bool,
    ) -> tuple[Tensor, Mamba2State | None]:
        if self.context_parallel is not None and lengths is not None:
            raise ValueError("a mask cannot be used on a sequence that is split over ranks")
        alone = lengths is None and cu_seqlens is None and return_state
        if alone and state is not None and few_tokens.serves(self, u):
            y, *after = few_tokens.FewTokens(self).mix(u, *state)
            return y, Mamba2State(*after)
        if state is None and not return_state and self._is_one_operator(u, lengths):
            return self._mix_at_once(u, lengths, cu_seqlens), None
        *mlp, z, xBC, dt = self.in_proj(u).split(self._split_sizes, dim=-1)
        if self.bidirectional:
            y, final_state = self._scan_both_ways(xBC, dt, lengths, cu_seqlens), None
        else:
            y, final_state = self._scan(xBC, dt, lengths, cu_seqlens, state, return_state)
        return self._project_out(y, z, mlp), final_state

    def _is_one_operator(self, u: Tensor, lengths: Tensor | None) -> bool:
        """Whether `conv_ssd_norm` does what lies between the projections, on Triton."""
        usual = self.norm is not None and len(self._split_sizes) == 3
        # With a lower limit of dt, a step of 0 at padding is no dt that the operator could read.
        padded = lengths is not None and self.bidirectional and self.dt_limit[0] > 0
        return (
            usual
            and not padded
            and not self.conv_per_direction
            and self.context_parallel is None
            and resolve_backend("auto", u) == "triton"
        )

    def adds_itself(self, residual: Tensor, lengths: Tensor | None) -> bool:
        """Whether `add_to` may take the place of a norm, this mixer and an addition.

        It may without gradients, on Triton, in the sizes and types of `kernels.mamba2_block`, and
        where nobody waits for a call of the mixer or of its parts.
        """
        if torch.is_grad_enabled() or not self._is_one_operator(residual, lengths):
            return False
        norm: Any = self.norm
        dtype = autocast_dtype(self.in_proj.weight)
        return (
            type(self) is Mamba2
            and not any(has_hooks(part) for part in (self, self.conv1d, norm))
            and all(is_linear(p) and p.bias is None for p in (self.in_proj, self.out_proj))
            and norm.group_size == self.d_ssm
            and not norm.norm_before_gate
            and why_not_served(residual, dtype, self.d_ssm) is None
        )

    def add_to(
        self, residual: Tensor, norm: nn.RMSNorm, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """residual + self(norm(residual)) as one operator, where `adds_itself` allows it."""
        gated_norm: Any = self.norm
        return mamba2_block(
            residual,
            norm.weight,
            self.in_proj.weight,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self._decay_rates(),
            self._skip(),
            gated_norm.weight,
            self.out_proj.weight,
            headdim=self.headdim,
            ngroups=self.ngroups,
            d_state=self.d_state,
            dt_limit=self.dt_limit,
            eps=cast(float, norm.eps),
            gate_eps=gated_norm.eps,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
        )

    def _mix_at_once(self, u: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """(b, l, d_model), of a whole sequence without states to carry."""
        zxBCdt = self._project_in_aligned(u)
        if lengths is not None and self.bidirectional:
            padding = ~data_positions(lengths, u.shape[1])[..., None]
            fill = zxBCdt.new_zeros(zxBCdt.shape[2])
            fill[sum(self._split_sizes[:-1]) :] = DT_OF_PADDING
            zxBCdt = torch.where(padding, fill, zxBCdt)
        norm: Any = self.norm
        # With the second projection as part of it, the norm's output is not kept for the backward.
        projects = is_linear(self.out_proj) and self.out_proj.bias is None
        y = conv_ssd_norm(
            zxBCdt,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self._decay_rates(),
            self._skip(),
            norm.weight,
            headdim=self.headdim,
            ngroups=self.ngroups,
            d_state=self.d_state,
            dt_limit=self.dt_limit,
            eps=norm.eps,
            group_size=norm.group_size,
            norm_before_gate=norm.norm_before_gate,
            cu_seqlens=cu_seqlens,
            projection=self.out_proj.weight if projects else None,
        )
        return y if projects else self.out_proj(y)

    def _project_in_aligned(self, u: Tensor) -> Tensor:
        """in_proj(u), with further columns of 0 that round a row of half types up to 16 bytes.

        With two directions' dt a row often is not a multiple of that, and then the GPU's products
        of half types, forward and backward, take about twice as long.
        """
        weight, bias = self.in_proj.weight, self.in_proj.bias
        half = torch.is_autocast_enabled("cuda") or u.dtype in HALF
        further = -weight.shape[0] % 8
        if not half or further == 0 or not is_linear(self.in_proj):
            return self.in_proj(u)
        return F.linear(
            u,
            F.pad(weight, (0, 0, 0, further)),
            None if bias is None else F.pad(bias, (0, further)),
        )

    def _scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        state: Mamba2State | None,
        return_state: bool,
    ) -> tuple[Tensor, Mamba2State | None]:
        """(b, l, h, p), and the final state when asked for; padding matters to states only."""
        padded = lengths if return_state else None
        before = None if state is None else state.conv
        conv: Any = self._operators.causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_states=before,
            cu_seqlens=cu_seqlens,
            return_final_states=return_state,
        )
        mixed, window = conv if return_state else (conv, xBC[:, :0])
        if padded is not None:
            window = last_inputs(xBC, before, padded, self.d_conv - 1)
        x, B, C = self._split_conv(mixed)
        dt, dt_options = self._step_sizes(dt, padded)
        y: Any = self._operators.ssd(
            x,
            dt,
            self._decay_rates(),
            B,
            C,
            D=self._skip(),
            initial_states=None if state is None else state.ssm,
            cu_seqlens=cu_seqlens,
            return_final_states=return_state,
            **dt_options,
        )
        if not return_state:
            return y, None
        y, ssm_state = y
        return y, Mamba2State(window, ssm_state)

    def _scan_both_ways(
        self, xBC: Tensor, dt: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """(b, l, h, p). Trailing padding stands before the data of the reverse direction."""
        if lengths is not None:
            xBC = xBC.masked_fill(~data_positions(lengths, xBC.shape[1])[..., None], 0)
        mixed: Any
        if self.conv_per_direction:
            both = [
                self._operators.causal_conv1d(
                    xBC,
                    weight,
                    bias,
                    activation="silu",
                    cu_seqlens=cu_seqlens,
                    reverse=reverse,
                )
                for weight, bias, reverse in self._conv_of_directions()
            ]
            mixed = torch.stack(cast(list[Tensor], both))
        else:
            mixed = self._operators.causal_conv1d(
                xBC,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation="silu",
                cu_seqlens=cu_seqlens,
            )
        x, B, C = self._split_conv(mixed)
        dt, dt_options = self._step_sizes(dt, lengths)
        y: Any = self._operators.ssd_bidirectional(
            x, dt, self._decay_rates(), B, C, D=self._skip(), cu_seqlens=cu_seqlens, **dt_options
        )
        return y

    @property
    def _operators(self) -> Any:
        return kernels if self.context_parallel is None else self.context_parallel

    def _conv_of_directions(self) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        """Weight, bias and whether it runs in reverse, of each direction's own convolution."""
        weights = self.conv1d.weight.squeeze(1).chunk(2)
        biases = (None, None) if self.conv1d.bias is None else self.conv1d.bias.chunk(2)
        return zip(weights, biases, (False, True), strict=True)

    def _step_sizes(self, dt: Tensor, lengths: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """dt as the SSD takes it, (b, l, h) or (2, b, l, h), and how the SSD is to read it.

        With lengths, steps at padding have length 0: they leave a state as it is.
        """
        options = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}
        if lengths is not None:
            padding = ~data_positions(lengths, dt.shape[1])[..., None]
            if self.dt_limit[0] == 0:
                dt = dt.masked_fill(padding, DT_OF_PADDING)
            else:  # the clamp inside the op would raise a step of 0 to the lower limit
                exact = dt.to(_at_least_float32(dt.dtype)) + self.dt_bias.flatten()
                steps = F.softplus(exact).clamp(*self.dt_limit).masked_fill(padding, 0)
                dt, options = steps.to(dt.dtype), {}
        if self.bidirectional:
            dt = dt.unflatten(-1, (2, self.nheads)).permute(2, 0, 1, 3)
        return dt, options

    def _split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, h, p), B and C (…, g, n), views of xBC (…, conv_dim)."""
        groups = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, groups, groups], dim=-1)
        return (
            x.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _decay_rates(self) -> Tensor:
        return -torch.exp(self.A_log.to(_at_least_float32(self.A_log.dtype)))

    def _skip(self) -> Tensor:
        return self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def _project_out(self, y: Tensor, z: Tensor, mlp: list[Tensor]) -> Tensor:
        y = y.flatten(-2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        if mlp:
            gate, value = mlp
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        return self.out_proj(y)

    def _require_causal(self, what: str) -> None:
        if self.bidirectional:
            raise ValueError(
                f"{what}: a bidirectional mixer has no state to carry, its reverse direction "
                "begins at the end; build it with bidirectional=False"
            )


def last_inputs(x: Tensor, before: Tensor | None, lengths: Tensor, count: int) -> Tensor:
    """The last `count` inputs of each row, (b, count, d).

    x (b, l, d) with lengths[i] data tokens first in row i; before (b, count, d) came before x,
    zeros when None.
    """
    before = x.new_zeros(x.shape[0], count, x.shape[2]) if before is None else before
    position = lengths[:, None] - count + torch.arange(count, device=x.device)
    inside = x.gather(1, position.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    earlier = (position + count).clamp(max=max(count - 1, 0))
    earlier = before.to(x.dtype).gather(1, earlier[..., None].expand(-1, -1, x.shape[2]))
    return torch.where(position[..., None] >= 0, inside, earlier)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
