"""Speed of `generate` against the length of the text before, and what is carried along.

    python benchmarks/generate.py [--threads 1]                          # CPU
    python benchmarks/generate.py --device cuda --dtype bfloat16 --d-model 1024 --n-layer 24

A Mamba-2 `LanguageModel` of random weights, transformers' Mamba2ForCausalLM with its cache and the
same weights, and our LanguageModel of attention layers, about as many weights, whose key-value
cache grows. After prompts of each length every model yields tokens, the likeliest each time, for a
batch of one. The models take turns; prompt and tokens are timed apart, the table has medians. A
model starts no further round of a length on which it has spent --seconds. The record has the load
of the machine before and after: other work on it makes every number worse.

Writes generate.json, generate.md and generate.png into benchmarks/results.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from _record import RESULTS, write_record
from matplotlib.figure import Figure
from torch import Tensor
from transformers import Mamba2ForCausalLM

from mamba2_apps.backbone import BackboneConfig
from mamba2_apps.language import LanguageModel

OURS, THEIRS, ATTENTION = "LanguageModel", "transformers", "attention"
HEADDIM, D_STATE, VOCAB = 64, 64, 1024
CONTEXTS = {
    "cpu": [128, 512, 2048, 8192, 32768],
    "cuda": [128, 1024, 8192, 65536, 262144, 524288],
}
WARM_UP = 2  # tokens after each prompt that are not counted


class Decoder(Protocol):
    """A model that yields tokens, and what it carries from one to the next."""

    state: Any

    def tokens(self, ids: Tensor, count: int) -> Iterator[Tensor]: ...


class Ours:
    """`LanguageModel.generate`; the state is looked at on its way."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.state = model, None
        step = model.backbone.step

        def step_seen(*inputs: Any) -> Any:
            hidden, self.state = step(*inputs)
            return hidden, self.state

        model.backbone.step = step_seen  # type: ignore[method-assign]

    def tokens(self, ids: Tensor, count: int) -> Iterator[Tensor]:
        return self.model.generate(ids, count)


class Theirs:
    """The forward calls that transformers' `generate` makes, without what it does around them."""

    def __init__(self, model: Mamba2ForCausalLM) -> None:
        self.model, self.state = model, None

    @torch.inference_mode()
    def tokens(self, ids: Tensor, count: int) -> Iterator[Tensor]:
        for _ in range(count):
            out = self.model(ids, cache_params=self.state, use_cache=True, logits_to_keep=1)
            self.state = out.cache_params
            ids = out.logits[:, -1:].argmax(-1)
            yield ids[:, 0]


def build(options: argparse.Namespace) -> tuple[dict[str, Decoder], dict[str, int]]:
    """The models, and how many weights they have."""
    torch.manual_seed(0)
    d_model, n_layer = options.d_model, options.n_layer
    mamba = LanguageModel(
        BackboneConfig(d_model, n_layer, d_state=D_STATE, headdim=HEADDIM), VOCAB
    ).eval()
    attention = LanguageModel(
        BackboneConfig(
            d_model,
            n_layer,
            attn_layer_idx=tuple(range(n_layer)),
            attn_cfg={
                "num_heads": d_model // HEADDIM,
                "rotary_emb_dim": HEADDIM,
                "mlp_dim": d_model
                // 2
                * 3,  # makes up for the weights that a Mamba-2 layer has more
            },
        ),
        VOCAB,
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        mamba.save_hugging_face(folder)
        theirs = Mamba2ForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(VOCAB, (1, 300))
    with torch.no_grad():
        torch.testing.assert_close(mamba(ids), theirs(ids).logits, rtol=1e-3, atol=1e-3)
    models = {OURS: mamba, THEIRS: theirs, ATTENTION: attention}
    for model in models.values():
        model.to(device=options.device, dtype=getattr(torch, options.dtype))
    weights = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {OURS: Ours(mamba), THEIRS: Theirs(theirs), ATTENTION: Ours(attention)}, weights


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a state, whatever holds them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def mebibytes(state: Any) -> float:
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in tensors_in(state)}
    return sum(sizes.values()) / 2**20


def timed(tokens: Iterator[Tensor]) -> float:
    """Seconds until the next token is there."""
    start = time.perf_counter()
    next(tokens).tolist()  # waits for a GPU
    return time.perf_counter() - start


def measure(decoder: Decoder, ids: Tensor, count: int) -> tuple[float, list[float], float]:
    """Seconds of the prompt and of each of count tokens, and the mebibytes carried at the end."""
    decoder.state = None
    tokens = decoder.tokens(ids, 1 + WARM_UP + count)
    prompt = timed(tokens)
    seconds = [timed(tokens) for _ in range(WARM_UP + count)][WARM_UP:]
    carried = mebibytes(decoder.state)
    decoder.state = None
    return prompt, seconds, carried


def rows_of(
    decoders: dict[str, Decoder], context: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each model, after prompts of `context` tokens."""
    ids = torch.randint(VOCAB, (1, context), device=options.device)
    prompts: dict[str, list[float]] = {name: [] for name in decoders}
    tokens: dict[str, list[float]] = {name: [] for name in decoders}
    carried: dict[str, float] = {}
    failed: dict[str, str] = {}
    for _ in range(options.repeats):
        for name, decoder in decoders.items():
            if name in failed or sum(prompts[name]) + sum(tokens[name]) > options.seconds:
                continue
            try:
                prompt, seconds, carried[name] = measure(decoder, ids, options.tokens)
            except torch.OutOfMemoryError:
                failed[name] = "out of memory"
                torch.cuda.empty_cache()
                continue
            prompts[name].append(prompt)
            tokens[name] += seconds
    rows: list[dict[str, Any]] = []
    for name in decoders:
        row: dict[str, Any] = {"model": name, "context": context}
        if name in failed:
            rows.append(row | {"failed": failed[name]})
            continue
        prompt, second = statistics.median(prompts[name]), statistics.median(tokens[name])
        rows.append(
            row
            | {
                "prompt_s": round(prompt, 4),
                "prompt_tokens_per_s": round(context / prompt, 1),
                "token_ms": round(1e3 * second, 3),
                "tokens_per_s": round(1 / second, 1),
                "state_mib": round(carried[name], 3),
                "rounds": len(prompts[name]),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each length, the three models side by side."""
    models = (OURS, THEIRS, ATTENTION)
    columns = {"tokens/s": "tokens_per_s", "MiB": "state_mib", "prompt s": "prompt_s"}
    names = [f"{title} {model}" for title in columns for model in models]
    lines = [f"| prompt | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for context in sorted({row["context"] for row in rows}):
        found = {row["model"]: row for row in rows if row["context"] == context}
        cells = [
            rounded(found[model][key]) if key in found[model] else found[model]["failed"]
            for key in columns.values()
            for model in models
        ]
        lines.append(f"| {context:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def caption(record: dict[str, Any]) -> str:
    sizes = record["sizes"]
    low, high = sorted(record["load_before_and_after"])
    return (
        f"d_model {sizes['d_model']}, {sizes['n_layer']} layers, random weights, "
        f"{record['dtype']}, {record['device']}; {record['threads']} CPU threads of "
        f"{record['cores']} cores, load {low} to {high}; medians.\n\n"
    )


def rounded(value: float) -> str:
    """Whole numbers from 100 on, two digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second, and the mebibytes carried, over the length of the prompt."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    panels = {"tokens_per_s": "tokens/s after the prompt", "state_mib": "MiB carried"}
    for axis, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for model, style in ((OURS, "-"), (THEIRS, "--"), (ATTENTION, ":")):
            points = [(r["context"], r[key]) for r in rows if r["model"] == model and key in r]
            axis.plot(*zip(*points, strict=True), style, marker=".", label=model)
        axis.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel=label)
        ticks = sorted({row["context"] for row in rows})
        axis.set_xticks(ticks, [f"{t / 1024:g}k" if t >= 1024 else str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(CONTEXTS), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=32, help="timed after each prompt")
    parser.add_argument("--repeats", type=int, default=3, help="rounds for each length")
    parser.add_argument("--seconds", type=float, default=10.0, help="see above")
    parser.add_argument("--name", default="generate", help="of the files in results/")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    load = [round(os.getloadavg()[0], 2)]
    decoders, weights = build(options)
    for decoder in decoders.values():  # first calls cost more
        measure(decoder, torch.zeros(1, 300, dtype=torch.int64, device=options.device), 4)
    rows = []
    for context in sorted(options.contexts or CONTEXTS[options.device]):
        for row in rows_of(decoders, context, options):
            print(row, flush=True)
            rows.append(row)
    load.append(round(os.getloadavg()[0], 2))
    sizes = {"d_model": options.d_model, "n_layer": options.n_layer, "vocab_size": VOCAB}
    sizes |= {"d_state": D_STATE, "headdim": HEADDIM, "expand": 2}
    record = {
        "sizes": sizes,
        "weights": weights,
        "device": options.device,
        "dtype": options.dtype,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before_and_after": load,
        "rows": rows,
    }
    write_record(options.name, ("mamba2-apps", "torch", "transformers"), record)
    text = caption(record) + table(rows)
    (RESULTS / f"{options.name}.md").write_text(text, encoding="utf-8")
    draw(rows, RESULTS / f"{options.name}.png")
    print(table(rows))


if __name__ == "__main__":
    main()
