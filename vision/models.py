"""Bidirectional Mamba-2 image classifiers, registered with timm.

A model cuts an image into patches, adds a learned position to each, reads them row by row with a
bidirectional Backbone and classifies their mean, or a class token in the middle of the sequence, as
Vision Mamba does (Zhu et al. 2024, arXiv:2401.09417).

Dimensions: batch b · channels c · height H · width W · seqlen l (rows × columns of patches, and the
class token) · d_model d · classes k
"""

import copy
import math
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    get_device_dtype,
    global_pool_nlc,
    register_notrace_module,
    resample_abs_pos_embed,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import get_pretrained_grid_size, update_model_input_size
from torch import Tensor, nn

from mamba2_apps.backbone import Backbone, BackboneConfig

from .adapter import PatchProjection

POOLS = ("avg", "avgmax", "max", "token", "")
WIDTHS = {"tiny": 192, "small": 384, "base": 768}
PLACES = {"first": 0, "middle": 1, "last": 2}  # in halves of the sequence


class PatchEmbed(nn.Module):
    """Images (b, c, H, W) to a grid of patch embeddings (b, rows, columns, d).

    timm's PatchEmbed with a stride: patches overlap where it is smaller than they are.

    Args:
        img_size: height and width of the images.
        patch_size: sides of a patch.
        stride: distance between patches; None: patch_size.
        in_chans: channels of the images.
        embed_dim: width d of the embeddings.
        strict_img_size: accept images of img_size only.
        dynamic_img_pad: pad images of other sizes at the right and at the bottom until patches
            cover them; without it a size that patches do not cover is an error.
    """

    dynamic_img_pad: Final[bool]
    strict_img_size: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None,
        in_chans: int,
        embed_dim: int,
        *,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.stride = to_2tuple(patch_size if stride is None else stride)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = PatchProjection(
            in_chans, embed_dim, self.patch_size, stride=self.stride, device=device, dtype=dtype
        )
        self._set_img_size(to_2tuple(img_size))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        if self.strict_img_size:
            expected = f"expected {self.img_size}; resize it, call set_input_size or create the "
            expected += "model with dynamic_img_size=True"
            torch._assert(height == self.img_size[0], f"an image {height} pixels high, {expected}")
            torch._assert(width == self.img_size[1], f"an image {width} pixels wide, {expected}")
        elif self.dynamic_img_pad:
            rows, columns = self.dynamic_feat_size((height, width))
            bottom = (rows - 1) * self.stride[0] + self.patch_size[0] - height
            right = (columns - 1) * self.stride[1] + self.patch_size[1] - width
            x = F.pad(x, (0, right, 0, bottom))
        else:
            cover = f"which patches of {self.patch_size} do not cover; create the model with "
            cover += "dynamic_img_pad=True"
            spare_rows, spare_columns = height - self.patch_size[0], width - self.patch_size[1]
            torch._assert(spare_rows >= 0, f"an image {height} pixels high, {cover}")
            torch._assert(spare_columns >= 0, f"an image {width} pixels wide, {cover}")
            torch._assert(
                spare_rows % self.stride[0] == 0, f"an image {height} pixels high, {cover}"
            )
            torch._assert(
                spare_columns % self.stride[1] == 0, f"an image {width} pixels wide, {cover}"
            )
        return self.proj(x).permute(0, 2, 3, 1)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of this size."""
        spare_rows = img_size[0] - self.patch_size[0]
        spare_columns = img_size[1] - self.patch_size[1]
        if self.dynamic_img_pad:
            spare_rows = max(spare_rows + self.stride[0] - 1, 0)
            spare_columns = max(spare_columns + self.stride[1] - 1, 0)
        return spare_rows // self.stride[0] + 1, spare_columns // self.stride[1] + 1

    @torch.jit.ignore
    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels between patches."""
        return max(self.stride) if as_scalar else self.stride

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image's or the patches' size; a stride equal to the patches' follows them."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            old, size = self.proj, to_2tuple(patch_size)
            stride = size if self.stride == self.patch_size else self.stride
            new = PatchProjection(
                old.in_channels,
                old.out_channels,
                size,
                stride=stride,
                device=old.weight.device,
                dtype=old.weight.dtype,
            ).train(old.training)
            with torch.no_grad():
                new.weight.copy_(resample_patch_embed(old.weight, list(size)))
                new.bias.copy_(old.bias)  # type: ignore[union-attr, arg-type]
            for ours, before in zip(new.parameters(), old.parameters(), strict=True):
                ours.requires_grad_(before.requires_grad)
            self.proj, self.patch_size, self.stride = new, size, stride
        self._set_img_size(self.img_size if img_size is None else to_2tuple(img_size))

    def _set_img_size(self, img_size: tuple[int, int]) -> None:
        if min(img_size[0] - self.patch_size[0], img_size[1] - self.patch_size[1]) < 0:
            raise ValueError(
                f"img_size={img_size}: an image smaller than a patch, {self.patch_size}; resize it "
                "or choose a smaller patch_size"
            )
        self.img_size = img_size
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]


@register_notrace_module
class ImageBackbone(Backbone):
    """A Backbone that FX and TorchScript take as one function of its input."""

    def forward(self, embeddings: Tensor, **options: Any) -> Any:
        return super().forward(embeddings, **options)

    def __prepare_scriptable__(self) -> nn.Module:
        return _opaque(self)


def _opaque(backbone: Backbone) -> nn.Module:
    """What TorchScript sees of a backbone: its parameters, and a function it does not look into."""

    class Opaque(nn.Module):
        def forward(self, embeddings: Tensor) -> Tensor:
            return self.run(embeddings)

        @torch.jit.ignore
        def run(self, embeddings: Tensor) -> Tensor:
            return backbone(embeddings)  # of the closure: `self` is a ScriptModule by now

    opaque = Opaque()
    for name, parameter in backbone.named_parameters():
        opaque.register_parameter(name.replace(".", "_"), parameter)
    return opaque


class BiMamba2(nn.Module):
    """Image classifier on a bidirectional Mamba-2 backbone; a timm model.

    Args:
        img_size: height and width of the images.
        patch_size: sides of a patch.
        stride: distance between patches; None: patch_size, so that they do not overlap.
        in_chans: channels of the images.
        num_classes: classes k; 0: no classifier, the model gives pooled features.
        global_pool: avg, avgmax or max over the patches, token for the class token, or "" for none.
        embed_dim: width d.
        depth: number of blocks.
        d_state: state size of a head's channel.
        d_conv: width of the short convolution.
        expand: inner width over embed_dim.
        headdim: channels of a head.
        ngroups: groups of heads that share B and C.
        conv_per_direction: a convolution for each direction, so that x, B and C differ between
            them, too.
        mlp_dim: inner width of a SwiGLU after each mixer. 0: none.
        class_token: put a learned class token into the sequence.
        class_token_at: first, middle or last in the sequence. forward_features gives it first
            wherever it is, as timm's other models do.
        dynamic_img_size: accept any image size, the positions resampled (bicubic).
        dynamic_img_pad: pad images until patches cover them.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the positions.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        device: where the parameters lie.
        dtype: the parameters' type; A_log, D and dt_bias start as float32.

    Raises:
        ValueError: a value that no model can have; the message names it.
    """

    dynamic_img_size: Final[bool]
    __jit_unused_properties__: ClassVar = ["grad_checkpointing"]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        *,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        conv_per_direction: bool = False,
        mlp_dim: int = 0,
        class_token: bool = False,
        class_token_at: str = "middle",
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if class_token_at not in PLACES:
            raise ValueError(
                f"class_token_at={class_token_at!r}: expected one of {', '.join(PLACES)}"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.global_pool = self._checked_pool(global_pool)
        self.class_token_halves = PLACES[class_token_at]
        self.dynamic_img_size = dynamic_img_size or dynamic_img_pad

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            stride,
            in_chans,
            embed_dim,
            strict_img_size=not self.dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim, **dd))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        config = BackboneConfig(
            embed_dim,
            depth,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            bidirectional=True,
            conv_per_direction=conv_per_direction,
            d_intermediate=mlp_dim,
            drop_path=drop_path_rate,
        )
        self.backbone = ImageBackbone(config, **dd)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"backbone.layers.{i}", "num_chs": embed_dim, "reduction": reduction}
            for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw the weights anew; needs_reset False keeps what submodules drew when they were built.

        mode: "" is the only one.
        """
        if mode:
            raise ValueError(f"mode={mode!r}: expected '', the only initialisation")
        if needs_reset:
            self.patch_embed.proj.reset_parameters()
            self.backbone.reset_parameters()
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        exempt = ("pos_embed", "cls_token", "A_log", "dt_bias", ".D")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, from the image to the head, for layer-wise decay."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": r"^backbone"
            if coarse
            else [(r"^backbone\.layers\.(\d+)", None), (r"^backbone\.norm_f", (99999,))],
        }

    @property
    def grad_checkpointing(self) -> bool:
        """What `set_grad_checkpointing` set."""
        return self.backbone.config.gradient_checkpointing

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the residual stream between blocks, compute the rest again in the backward."""
        self.backbone.config = replace(self.backbone.config, gradient_checkpointing=enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes: none. global_pool None keeps the pooling."""
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.embed_dim, num_classes, **get_device_dtype(self))
            if num_classes > 0
            else nn.Identity()
        )
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image's or the patches' size; positions and patches are resampled."""
        before = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.patch_embed.grid_size != before:
            self.pos_embed = nn.Parameter(
                _resampled(self.pos_embed.detach(), before, self.patch_embed.grid_size),
                requires_grad=self.pos_embed.requires_grad,
            )
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The residual stream after chosen blocks, and the final features unless told otherwise.

        Args:
            x: images (b, c, H, W).
            indices: the last n blocks, these blocks, or all for None.
            return_prefix_tokens: give pairs of patches and class token (b, 1, d).
            norm: apply the final norm.
            stop_early: leave out the blocks after the last one asked for.
            output_fmt: NCHW, or NLC for (b, patches, d).
            intermediates_only: leave out the final features.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected NCHW or NLC")
        layers = self.backbone.layers
        chosen, last = feature_take_indices(len(layers), indices)
        embeddings = self.patch_embed(x)
        rows, columns = embeddings.shape[1:3]
        embeddings = self._tokens(embeddings)
        again = self.backbone.config.gradient_checkpointing and self.training
        residual, taken = self.backbone._residual(embeddings), []
        for i, layer in enumerate(layers[: last + 1] if stop_early else layers):
            residual = checkpoint(layer, residual)[0] if again else layer(residual)[0]
            if i in chosen:
                tapped = self.backbone.norm_f(residual) if norm else residual
                taken.append(self._class_token_first(tapped.to(embeddings.dtype)))
        patches: list[Any] = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            patches = [
                p.transpose(1, 2).unflatten(2, (rows, columns)).contiguous() for p in patches
            ]
        if return_prefix_tokens and self.num_prefix_tokens:
            patches = [
                (p, t[:, : self.num_prefix_tokens]) for p, t in zip(patches, taken, strict=True)
            ]
        if intermediates_only:
            return patches
        return self._class_token_first(self.backbone.norm_f(residual)), patches

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one chosen, and the norm and the head where asked."""
        chosen, last = feature_take_indices(len(self.backbone.layers), indices)
        self.backbone.layers = self.backbone.layers[: last + 1]
        if prune_norm:
            self.backbone.norm_f = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (b, c, H, W) to tokens (b, l, d) after the final norm, the class token first."""
        return self._class_token_first(self.backbone(self._tokens(self.patch_embed(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (b, l, d) to logits (b, k), or to what the classifier reads (b, d)."""
        x = global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _tokens(self, grid: Tensor) -> Tensor:
        """A grid of patches (b, rows, columns, d) to the sequence that the backbone reads."""
        positions = self.pos_embed
        if self.dynamic_img_size:
            positions = resample_abs_pos_embed(
                positions,
                [grid.shape[1], grid.shape[2]],
                [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]],
                num_prefix_tokens=0,
            )
        x = grid.flatten(1, 2) + positions
        if self.cls_token is not None:
            at = x.shape[1] * self.class_token_halves // 2
            token = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :at], token, x[:, at:]], dim=1)
        return self.pos_drop(x)

    def _class_token_first(self, x: Tensor) -> Tensor:
        if self.cls_token is None or self.class_token_halves == 0:
            return x
        at = (x.shape[1] - 1) * self.class_token_halves // 2
        return torch.cat([x[:, at : at + 1], x[:, :at], x[:, at + 1 :]], dim=1)

    @torch.jit.ignore
    def _checked_pool(self, pool: str) -> str:
        if pool not in POOLS:
            raise ValueError(f"global_pool={pool!r}: expected one of {', '.join(map(repr, POOLS))}")
        if pool == "token" and self.num_prefix_tokens == 0:
            raise ValueError("global_pool='token': the model has no class token; class_token=True")
        return pool

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script puts scriptable submodules in place of ours; that must not reach `self`.
        twin = copy.copy(self)
        twin.__dict__["_modules"] = dict(self._modules)
        return twin


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: BiMamba2, settings: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """A checkpoint of other patch or image sizes, resampled to the model's.

    Weights alone do not tell the grid that their positions are of. It is that of `settings`, the
    arguments of the checkpoint's own model (by default those that timm read beside the weights);
    without any it is taken to be the model's own where that has as many positions, else timm's
    default of the name, else a square. So load weights of 2 x 8 patches into a model of 4 x 4 by
    `set_input_size`: create the model with the img_size of the checkpoint first.
    """
    state_dict = dict(state_dict.get("state_dict", state_dict))  # type: ignore[arg-type]
    weight = state_dict.get("patch_embed.proj.weight")
    settings = settings or getattr(model, "pretrained_model_args", None) or {}
    old_grid = _grid_of(state_dict, weight, model, settings)
    if weight is not None:
        size = list(model.patch_embed.patch_size)
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(weight, size)
    if old_grid is not None and old_grid != model.patch_embed.grid_size:
        positions = state_dict["pos_embed"]
        state_dict["pos_embed"] = _resampled(positions, old_grid, model.patch_embed.grid_size)
    return state_dict


def _grid_of(
    state_dict: dict[str, Tensor],
    weight: Tensor | None,
    model: BiMamba2,
    settings: dict[str, Any],
) -> tuple[int, int] | None:
    """Rows and columns of a checkpoint's positions, as `checkpoint_filter_fn` says."""
    if "pos_embed" not in state_dict:
        return None
    count = state_dict["pos_embed"].shape[1]
    if settings.get("img_size") is not None:
        patch_size = model.patch_embed.patch_size if weight is None else tuple(weight.shape[-2:])
        grid = PatchEmbed(
            settings["img_size"],
            settings.get("patch_size", patch_size),
            settings.get("stride"),
            in_chans=1,
            embed_dim=1,
            dynamic_img_pad=settings.get("dynamic_img_pad", False),
            device="meta",
        ).grid_size
        if math.prod(grid) == count:
            return grid
    elif count == model.patch_embed.num_patches:
        return model.patch_embed.grid_size
    known = get_pretrained_grid_size(model, weight, count)
    side = math.isqrt(count)
    if known is None and side * side != count:
        raise ValueError(
            f"pos_embed has {count} positions, no square; create the model with the img_size of "
            "the checkpoint, load it, then call set_input_size"
        )
    return known or (side, side)


def _resampled(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    return resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=0)


class ImageClassifier(BiMamba2):
    """A BiMamba2 as a recipe's model. Its weights are those of the timm model of that size.

    Args:
        num_outputs: classes.
        size: tiny, small or base: width 192, 384 or 768.
        options: those of BiMamba2.
    """

    def __init__(
        self, num_outputs: int, *, size: Literal["tiny", "small", "base"] = "tiny", **options: Any
    ) -> None:
        super().__init__(num_classes=num_outputs, embed_dim=WIDTHS[size], **options)

    def features(
        self, inputs: Tensor, mask: Tensor | None = None, hide: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Tokens (b, l, d) after the final norm, the class token first; images have no mask."""
        return self.forward_features(inputs), None

    def embed(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the classifier reads, (b, d)."""
        return self.forward_head(self.forward_features(inputs), pre_logits=True)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(inputs)

    def fit_tensors(
        self, tensors: dict[str, Tensor], settings: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Another RUN's weights, positions and patches resampled to this model's sizes.

        settings: "init_args" of the RUN's model, which tell the grid of its positions.
        """
        return checkpoint_filter_fn(tensors, self, settings.get("init_args"))


class TimmModel(nn.Module):
    """Any timm classifier as a recipe's model, to compare ours with.

    Args:
        num_outputs: classes.
        name: the timm name, such as deit_tiny_patch16_224.
        pretrained: start from the weights that timm knows for this name.
        checkpoint: start from this file of weights; another image size is resampled (of ours as
            `checkpoint_filter_fn` says), a classifier for another number of classes is left out.
        options: further options of the model, such as img_size, in_chans, stride or drop_path_rate.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        name: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        overlay = None if checkpoint is None else {"file": checkpoint, "num_classes": -1}
        self.model: Any = create_model(
            name,
            pretrained=pretrained or checkpoint is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=num_outputs,
            **(options or {}),
        )

    @property
    def portable(self) -> nn.Module:
        """The timm model itself, whose weights timm.create_model(name, checkpoint_path=…) reads."""
        return self.model

    def no_weight_decay(self) -> set[str]:
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}

    def features(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Unpooled features, (b, l, d) or as the model gives them; images have no mask."""
        return self.model.forward_features(inputs), None

    def embed(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the classifier reads, (b, d)."""
        return self.model.forward_head(self.features(inputs)[0], pre_logits=True)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(inputs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "bimamba2_tiny_patch16_224.untrained": _cfg(),
        "bimamba2_small_patch16_224.untrained": _cfg(),
        "bimamba2_base_patch16_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BiMamba2:
    kwargs.setdefault("embed_dim", WIDTHS[variant.split("_")[1]])
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        BiMamba2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def bimamba2_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> BiMamba2:
    """Width 192, 24 blocks, 6.4 million parameters."""
    return _create(
        "bimamba2_tiny_patch16_224", pretrained, **{"embed_dim": WIDTHS["tiny"], **kwargs}
    )


@register_model
def bimamba2_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> BiMamba2:
    """Width 384, 24 blocks, 23.5 million parameters."""
    return _create(
        "bimamba2_small_patch16_224", pretrained, **{"embed_dim": WIDTHS["small"], **kwargs}
    )


@register_model
def bimamba2_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> BiMamba2:
    """Width 768, 24 blocks, 89.9 million parameters."""
    return _create(
        "bimamba2_base_patch16_224", pretrained, **{"embed_dim": WIDTHS["base"], **kwargs}
    )
