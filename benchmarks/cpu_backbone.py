"""Backbone against transformers' Mamba2Model of the same weights, on a CPU.

    python benchmarks/cpu_backbone.py

4 layers, d_model 256, headdim 64, d_state 64, expand 2, float32, eager, 2 threads. The models take
turns within each repetition, so that a busy moment of the machine meets all of them; the table has
medians. "wall" is the same stack with the SSD left out (projections, convolution, norms): no faster
SSD can pass it. Writes benchmarks/results/cpu_backbone.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
from _record import write_record
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2Model

from mamba2_apps.backbone import Backbone, BackboneConfig

SHAPES = [(8, 256), (2, 1024), (1, 4096)]
D_MODEL, N_LAYER, HEADDIM, D_STATE, EXPAND = 256, 4, 64, 64, 2
BAR = 2.2


def build() -> tuple[Backbone, Mamba2Model]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    theirs = Mamba2Model(
        Mamba2Config(
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYER,
            num_heads=EXPAND * D_MODEL // HEADDIM,
            head_dim=HEADDIM,
            state_size=D_STATE,
            expand=EXPAND,
            n_groups=1,
            vocab_size=8,
            use_cache=False,
        )
    )
    ours = Backbone(
        BackboneConfig(D_MODEL, N_LAYER, d_state=D_STATE, headdim=HEADDIM, expand=EXPAND)
    )
    weights = theirs.state_dict()
    ours.load_state_dict({k: v for k, v in weights.items() if not k.startswith("embeddings")})
    return ours, theirs


def median_times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= 2:  # the first two rounds warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shape: tuple[int, int], backward: bool, repeats: int) -> dict[str, float]:
    """Median milliseconds of ours, transformers and the wall, and the ratios."""
    ours, theirs = (model.train(backward) for model in build())
    x = torch.randn(*shape, D_MODEL)

    def run(model: nn.Module, forward: Callable[[], Tensor], without_ssd: bool = False) -> None:
        skip = mock.patch("mamba2_apps.mixer.ssd", lambda x, *_, **__: x)
        with skip if without_ssd else nullcontext():
            with torch.set_grad_enabled(backward):
                hidden = forward()
            if backward:
                model.zero_grad()
                hidden.sum().backward()

    def hidden_of_theirs() -> Tensor:
        return theirs(inputs_embeds=x).last_hidden_state

    with torch.no_grad():
        torch.testing.assert_close(ours(x), hidden_of_theirs(), rtol=1e-3, atol=1e-3)
    times = median_times(
        {
            "ours": lambda: run(ours, lambda: ours(x)),
            "transformers": lambda: run(theirs, hidden_of_theirs),
            "wall": lambda: run(ours, lambda: ours(x), without_ssd=True),
        },
        repeats,
    )
    row = {f"{name}_ms": round(1e3 * seconds, 2) for name, seconds in times.items()}
    return row | {
        "times_faster": round(times["transformers"] / times["ours"], 2),
        "wall_times_faster": round(times["transformers"] / times["wall"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21, help="timed rounds for each row")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)

    rows = []
    print(f"{'tokens':>10} {'':17}{'ours':>10}{'transformers':>14}{'wall':>10}{'faster':>9}")
    for shape in SHAPES:
        for backward in (False, True):
            mode = "forward+backward" if backward else "forward"
            row = measure(shape, backward, repeats)
            rows.append({"batch": shape[0], "seqlen": shape[1], "mode": mode} | row)
            times = [f"{row[f'{name}_ms']:.1f} ms" for name in ("ours", "transformers", "wall")]
            print(
                f"{shape!s:>10} {mode:17}{times[0]:>10}{times[1]:>14}{times[2]:>10}"
                f"{row['times_faster']:>8.2f}×",
                flush=True,
            )
    sizes = {"d_model": D_MODEL, "n_layer": N_LAYER, "headdim": HEADDIM, "d_state": D_STATE}
    results = {"sizes": sizes | {"expand": EXPAND}, "dtype": "float32", "repeats": repeats}
    path = write_record(
        "cpu_backbone", ["mamba2-apps", "torch", "transformers"], results | {"rows": rows}
    )
    missed = sum(row["times_faster"] < BAR for row in rows)
    print(f"{len(rows) - missed} of {len(rows)} rows at or above {BAR}×; written to {path}")


if __name__ == "__main__":
    main()
