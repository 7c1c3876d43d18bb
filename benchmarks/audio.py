"""Speed and memory of the audio models: beside a ViT on the same spectrograms, and on a stream.

    python benchmarks/audio.py throughput          # one GPU; 1 s to 10 min of audio in a sample
    python benchmarks/audio.py stream --hours 1    # one CPU thread

throughput: a bidirectional model over 16 x 16 patches and timm's VisionTransformer (AST's shape)
of the same width, with as many blocks as give it the nearest parameter count, take the same
normalised spectrograms, in bfloat16 autocast; the blocks of both are compiled, and the ViT attends
by SDPA. A training step is forward, loss, backward and a fused AdamW step. The ViT gets no position
embedding: at 30,000 tokens it would double its parameters. Writes results/audio_throughput.json.

stream: PCM in pieces of 100 ms through causal models of random weights, the time of each piece, and
the process's memory along the way. Writes results/audio_stream.json.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _record import write_record
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mamba2_apps.audio.models import WIDTHS, audio_model
from mamba2_apps.audio.preprocessing import AudioPreprocessing
from mamba2_apps.audio.streaming import AudioStream
from mamba2_apps.tasks import Classification, OptimizerConfig

CLASSES, PATCH, MELS = 50, 16, 128
SECONDS = (1, 10, 60, 300, 600)
TOKENS_OF_A_BATCH = 30_000
BAR = 2.5
PIECE = 1600  # samples, 100 ms


class Ours(nn.Module):
    """Spectrograms (b, t, m) to logits: adapter, backbone and head as in a training."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.model = audio_model(CLASSES, size)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.model.backbone(self.model.adapter.embed(features))  # type: ignore[operator]
        return self.model.head(hidden)


class Transformer(nn.Module):
    """The same, by a ViT that attends to all patches."""

    def __init__(self, width: int, depth: int, frames: int) -> None:
        super().__init__()
        self.model = VisionTransformer(
            img_size=(frames, MELS), patch_size=PATCH, in_chans=1, num_classes=CLASSES,
            embed_dim=width, depth=depth, num_heads=width // 64, pos_embed="none",
            class_token=False, global_pool="avg",
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.model(features[:, None])


def throughput(options: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device)
    rows, depths = [], {}
    for size in options.sizes:
        ours = Ours(size)
        depth = depths[size] = nearest_depth(WIDTHS[size], parameters(ours))
        for seconds in options.seconds:
            frames = round(100 * seconds / PATCH) * PATCH
            tokens = frames // PATCH * (MELS // PATCH)
            batch = max(1, options.tokens // tokens)
            row: dict[str, Any] = {"size": size, "seconds": seconds, "tokens": tokens}
            row["batch"] = batch
            builders: dict[str, Callable[[], nn.Module]] = {
                "mamba2": lambda size=size: Ours(size),
                "vit": lambda size=size, d=depth, f=frames: Transformer(WIDTHS[size], d, f),
            }
            for name, build in builders.items():
                row[name] = measure(build, batch, frames, device, options.repeats)
            for what in ("train_clips_per_second", "infer_clips_per_second"):
                row[f"faster_{what[:5]}"] = row["mamba2"][what] / row["vit"][what]
            rows.append(row)
            print(row, flush=True)
            write_record(
                options.name, ("torch", "triton", "timm"),
                {"bar": BAR, "vit_blocks": depths, "rows": rows},
            )  # fmt: skip


def measure(
    build: Callable[[], nn.Module], batch: int, frames: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Clips per second and peak memory, training and inference."""
    torch._dynamo.reset()
    model = build().to(device)
    count = parameters(model)
    # fused exists on the CPU and the GPU: one kernel for all parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for block in blocks_of(model):
        block.compile()  # all blocks share one graph: compiling the whole takes minutes
    features = torch.randn(batch, frames, MELS, device=device)
    targets = torch.randint(CLASSES, (batch,), device=device)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(features).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            model(features)

    row: dict[str, Any] = {"parameters": count}
    for name, step in (("train", train), ("infer", infer)):
        model.train(name == "train")
        seconds, memory = timed(step, device, repeats)
        row[f"{name}_ms"] = 1e3 * seconds
        row[f"{name}_clips_per_second"] = batch / seconds
        row[f"{name}_gib"] = memory
    return row


def blocks_of(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The blocks of either model."""
    return model.model.backbone.layers if isinstance(model, Ours) else model.model.blocks  # type: ignore[union-attr, return-value]


def timed(step: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median seconds of a step after three to warm up, and peak GiB on a GPU."""
    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return statistics.median(times), memory


def nearest_depth(width: int, target: int) -> int:
    """Blocks of a ViT of this width with the number of parameters nearest to `target`."""
    with torch.device("meta"):
        counts = {d: parameters(Transformer(width, d, 160)) for d in range(8, 20)}
    return min(counts, key=lambda depth: abs(counts[depth] - target))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stream(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    results = {}
    for tokens in ("frame", "patch"):
        torch.manual_seed(0)
        model = audio_model(CLASSES, "tiny", tokens=tokens, causal=True)
        names = [str(i) for i in range(CLASSES)]
        task = Classification(model, names, OptimizerConfig()).eval()
        heard = AudioStream(task, AudioPreprocessing(sample_rate=16000), 16000)
        memory = {}
        pieces = round(options.hours * 36000)
        times = torch.zeros(pieces, 2, dtype=torch.float64)  # wall and CPU, whole at once
        for piece in range(pieces):
            samples = 0.1 * torch.randn(PIECE)
            start, cpu = time.perf_counter(), time.thread_time()
            heard.push(samples)
            times[piece, 0] = time.perf_counter() - start
            times[piece, 1] = time.thread_time() - cpu
            if piece % max(1, pieces // 10) == pieces // 10 - 1:
                memory[f"{(piece + 1) / 600:.1f} min"] = round(resident_mib(), 1)
        wall, cpu_times = times[20:].T.sort().values.tolist()
        results[tokens] = {
            "parameters": parameters(model),
            "pieces": pieces,
            # Patches of 160 ms arrive at some pieces and not at others: the mean counts.
            "mean_ms_per_100_ms": 1e3 * statistics.mean(wall),
            "median_ms": 1e3 * statistics.median(wall),
            "p99_ms": 1e3 * wall[int(0.99 * len(wall))],
            "mean_cpu_ms_per_100_ms": 1e3 * statistics.mean(cpu_times),
            "resident_mib": memory,
        }
        print(tokens, results[tokens], flush=True)
    write_record(options.name, ("torch",), {"bar_ms": 10, "models": results})


def resident_mib() -> float:
    """Memory of this process now; its peak where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("throughput")
    speed.add_argument("--sizes", nargs="+", choices=list(WIDTHS), default=["tiny", "base"])
    speed.add_argument("--seconds", nargs="+", type=int, default=list(SECONDS))
    speed.add_argument("--tokens", type=int, default=TOKENS_OF_A_BATCH, help="in a batch, about")
    speed.add_argument("--repeats", type=int, default=10)
    speed.add_argument("--device", default="cuda")
    speed.add_argument("--name", default="audio_throughput", help="of the result file")
    speed.set_defaults(run=throughput)
    live = commands.add_parser("stream")
    live.add_argument("--hours", type=float, default=1.0)
    live.add_argument("--name", default="audio_stream", help="of the result file")
    live.set_defaults(run=stream)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
