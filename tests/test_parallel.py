"""A sequence split over processes gives what one process gives: outputs, gradients, few bytes."""

import copy
import os
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.genomics.adapter import TokenEmbedding
from mamba2_apps.genomics.models import DNAModel
from mamba2_apps.heads import PooledHead, TokenHead, TrackHead
from mamba2_apps.parallel import split_sequence

KINDS = {
    "causal": {"ngroups": 2},
    "bidirectional": {"bidirectional": True, "dt_limit": (0.01, 0.5)},
    "own convolutions": {"bidirectional": True, "conv_per_direction": True},
}


class Model(nn.Module):
    """A backbone with answers per token and for the whole sequence."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone(BackboneConfig(32, 2, d_state=8, headdim=16, **options))
        self.head = PooledHead(32, 3)

    def forward(self, x):
        hidden = self.backbone(x)
        return hidden, self.head(hidden)


def dna_model(head=TokenHead, strands="single", packed=False, **adapter) -> DNAModel:
    sizes = BackboneConfig(32, 1, d_state=8, headdim=16, bidirectional=True)
    tokens = partial(TokenEmbedding, **adapter)
    return DNAModel(2, adapter=tokens, backbone=sizes, head=head, strands=strands, packed=packed)


def drawn(*size: int) -> torch.Tensor:
    """The same on every device."""
    generator = torch.Generator("cpu").manual_seed(1)
    values = torch.randn(*size, generator=generator, device="cpu")
    return values.to(torch.get_default_device())


def inputs(length: int) -> torch.Tensor:
    return drawn(2, length, 32)


def assert_alike(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Element by element; in the norm on a GPU, whose products round otherwise for other shapes."""
    close = 1e-10 if expected.dtype == torch.float64 else 1e-5
    if expected.is_cuda:
        assert (got - expected).norm() <= close * expected.norm()
    else:
        torch.testing.assert_close(got, expected, rtol=close, atol=close)


def objective(hidden, pooled, length):
    """A mean over tokens that weighs each place differently, and one over the pooled answers."""
    return (hidden * torch.arange(1, length + 1)[:, None] / length).mean() + pooled.square().mean()


def reference(kind: str, length: int, dtype: torch.dtype):
    model = Model(**KINDS[kind]).to(dtype)
    x = inputs(length).to(dtype).requires_grad_()
    hidden, pooled = model(x)
    objective(hidden, pooled, length).backward()
    return hidden.detach(), x.grad, [p.grad for p in model.parameters()]


def compare(kind: str, length: int, dtype: torch.dtype) -> None:
    """Outputs and gradients of the ranks together against those of one process."""
    size = dist.get_world_size()
    hidden0, x_grad0, grads0 = reference(kind, length, dtype)
    model = Model(**KINDS[kind]).to(dtype)
    context = split_sequence(model)
    copy.deepcopy(model)  # as a running average of weights does
    x = inputs(length).to(dtype).requires_grad_()
    hidden, pooled = model(context.shard(x))
    assert hidden.shape[1] == length // size
    places = torch.arange(1, length + 1, dtype=dtype)[:, None] / length
    ((hidden * context.shard(places, 0)).mean() + pooled.square().mean()).backward()
    assert_alike(context.gather(hidden.detach()), hidden0)
    # The objective is the mean of the ranks' losses.
    assert_alike(context.sum(x.grad) / size, x_grad0)
    for parameter, grad0 in zip(model.parameters(), grads0, strict=True):
        dist.all_reduce(parameter.grad)
        assert_alike(parameter.grad / size, grad0)


def bytes_sent(length: int) -> int:
    model = Model(**KINDS["bidirectional"])
    context = split_sequence(model)
    hidden, pooled = model(context.shard(inputs(length)))
    (hidden.mean() + pooled.mean()).backward()
    return context.bytes_sent


def mistakes() -> None:
    size = dist.get_world_size()
    model = Model(bidirectional=True)
    context = split_sequence(model)
    with pytest.raises(ValueError, match=f"a sequence of 65 does not split into {size}"):
        context.shard(inputs(65))
    with pytest.raises(ValueError, match="expected at least 3, the window"):
        model(inputs(2))
    with pytest.raises(ValueError, match="a mask cannot be used"):
        model.backbone(inputs(8), mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="cu_seqlens cannot be used"):
        model.backbone(inputs(8)[:1], cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32))
    hybrid = Backbone(BackboneConfig(64, 2, d_state=8, headdim=16, attn_layer_idx=(1,)))
    with pytest.raises(ValueError, match=r"layers\.1\.mixer is attention"):
        split_sequence(hybrid)
    for name, options in (
        ("adapter", {"context": 5}),
        ("adapter", {"positions": 8}),
        ("adapter", {"period": 3}),
        ("the model", {"strands": "equivariant"}),
        ("the model", {"packed": True}),
        ("head", {"head": TrackHead}),
    ):
        with pytest.raises(ValueError, match=rf"{name} \(\w+\) looks along the sequence"):
            split_sequence(dna_model(**options))
    split_sequence(dna_model())


def compare_on_a_mesh(size: int) -> None:
    """Rows over one dimension of a device mesh, slices over the other: one process's gradients."""
    device = torch.get_default_device().type
    mesh = init_device_mesh(device, (size // 2, 2), mesh_dim_names=("data", "context"))
    rows = drawn(size // 2, 48, 32).double()
    whole, split = (Model(bidirectional=True).double() for _ in range(2))
    sum(part.square().mean() for part in whole(rows)).backward()
    context = split_sequence(split, mesh["context"].get_group())
    row = rows[mesh["data"].get_local_rank()][None]
    replicated = DistributedDataParallel(split)  # kept: it averages while it lives
    sum(part.square().mean() for part in replicated(context.shard(row))).backward()
    for parameter, expected in zip(split.parameters(), whole.parameters(), strict=True):
        assert_alike(parameter.grad, expected.grad)


def main(rank: int, size: int, meeting: str, device: str) -> None:
    """What every process of the test runs."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_default_device(device)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=Path(meeting).as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    for kind in KINDS:
        compare(kind, 24 * size, torch.float32)
    compare("bidirectional", 4 * size, torch.float64)
    compare("causal", 300 * size, torch.float64)
    assert bytes_sent(64) == bytes_sent(640) > 0
    compare_on_a_mesh(size)
    mistakes()
    dist.destroy_process_group()


def needs(gpus: int):
    enough = torch.cuda.device_count() >= gpus
    return [pytest.mark.gpu, pytest.mark.skipif(not enough, reason=f"needs {gpus} CUDA devices")]


@pytest.mark.parametrize(
    ("device", "size"),
    [("cpu", 2), ("cpu", 4), *[pytest.param("cuda", n, marks=needs(n)) for n in (2, 4)]],
)
def test_slices_give_what_the_whole_gives(tmp_path, device, size):
    command = [sys.executable, __file__, str(size), str(tmp_path / "meeting"), device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]


if __name__ == "__main__":
    # Forked before torch has threads: the processes share one import.
    world_size = int(sys.argv[1])
    mp.start_processes(main, (world_size, *sys.argv[2:]), world_size, start_method="fork")
