"""The console script `mamba2-apps`.

Mistakes of the user end with one sentence on stderr and exit code 2, Ctrl-C with 130; with
MAMBA2_APPS_DEBUG=1 a traceback comes too. Heavy imports wait until a command needs them.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

PROG = "mamba2-apps"
PREDICT_OPTIONS = ("--output", "--format", "--stream", "--batch-size", "--device", "--help")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if words[:1] == ["predict"]:
        words = _with_joined_values(words)
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.command not in ("train", "predict"):
        parser.error(f"unknown argument {rest[0]!r}; see {PROG} {arguments.command} --help")
    arguments.overrides = rest
    try:
        return arguments.run_command(arguments)
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `head` does; a further flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("MAMBA2_APPS_DEBUG", "0") == "1":
            raise
        return _fail(error)


def _with_joined_values(words: list[str]) -> list[str]:
    """Words of `predict` with the options of a domain as --key=value.

    argparse does not know that they take a value, and would take the value for an input.
    """
    joined: list[str] = []
    for word in words:
        before = joined[-1] if joined else ""
        is_value = before.startswith("--") and "=" not in before and before not in PREDICT_OPTIONS
        if is_value and not word.startswith("--"):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def _fail(error: Exception) -> int:
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | TypeError | OSError):
        print(f"{PROG}: {message}", file=sys.stderr)
        return 2
    print(
        f"{PROG}: {type(error).__name__}: {message} (MAMBA2_APPS_DEBUG=1 shows where)",
        file=sys.stderr,
    )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG, description="One Mamba-2 backbone for images, DNA and audio."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, **options: Any
    ) -> Any:
        sub = commands.add_parser(name, help=text, description=text, **options)
        sub.set_defaults(run_command=run)
        return sub

    command("recipes", _recipes, "list the recipes that ship with the package")

    train = command(
        "train",
        _train,
        "train a recipe, or continue a run; `train RECIPE --help` lists the recipe's keys",
        usage=f"{PROG} train RECIPE [--run DIR] [--backbone START] [--key value ...] | "
        f"{PROG} train --resume RUN",
        add_help=False,
    )
    train.add_argument("recipe", nargs="?", help="a shipped name, or the path of a YAML file")
    train.add_argument("--run", type=Path, metavar="DIR", help="new directory to write to")
    train.add_argument(
        "--backbone", metavar="START", help="a RUN or a saved backbone to start from"
    )
    train.add_argument(
        "--parallel", choices=("ddp", "fsdp2"), help="how --trainer.devices share the work"
    )
    train.add_argument(
        "--strict", action="store_true", help="stop at the first thing that is wrong with the data"
    )
    train.add_argument("--resume", type=Path, metavar="RUN", help="run to continue to its end")
    train.add_argument("-h", "--help", action="store_true", help="show this help, or a recipe's")
    train.set_defaults(parser=train)

    evaluate = command("evaluate", _evaluate, "test a run on its recipe's test data")
    evaluate.add_argument("run", type=Path, metavar="RUN")

    predict = command(
        "predict",
        _predict,
        "predict files or folders with a run; a run may take options of its domain, as --key value",
        allow_abbrev=False,
    )
    predict.add_argument("run", type=Path, metavar="RUN")
    predict.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files or folders of them; - is standard input"
    )
    predict.add_argument("--output", type=Path, help="file to write (default: standard output)")
    predict.add_argument(
        "--format",
        help="csv or jsonl (default: jsonl for an --output that ends so, else csv); "
        "with --stream that of the input, and answers are jsonl",
    )
    predict.add_argument(
        "--stream", action="store_true", help="answer while the input is being read"
    )
    predict.add_argument("--batch-size", type=int, default=64)
    predict.add_argument(
        "--top-k", type=int, metavar="K", help="of a classifier's labels only the K likeliest"
    )
    predict.add_argument(
        "--device", help="such as cpu or cuda:0 (default: a GPU where there is one)"
    )

    embed = command("embed", _embed, "write a vector for each file into an .npz")
    embed.add_argument("run", type=Path, metavar="RUN")
    embed.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders of them")
    embed.add_argument("--output", type=Path, default=Path("embeddings.npz"), help="the .npz")
    embed.add_argument("--batch-size", type=int, default=64)
    embed.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU where there is one)")

    export = command("export", _export, "write a run's model for other programs")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument(
        "--format",
        required=True,
        choices=("safetensors", "torch", "onnx"),
        help="weights, a program for torch.export.load, or an ONNX graph",
    )
    export.add_argument("--output", type=Path, help="file to write (default: in RUN/export)")

    generate = command("generate", _generate, "continue a text with a language model's checkpoint")
    generate.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder, or a name on the Hugging Face Hub"
    )
    generate.add_argument("--prompt", required=True, help="text to continue; - is standard input")
    generate.add_argument("--max-new-tokens", type=int, default=100, help="at most (default: 100)")
    generate.add_argument(
        "--ignore-eos", action="store_true", help="go on after the checkpoint's end-of-text token"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    generate.add_argument("--top-k", type=int, help="sample among so many likeliest tokens")
    generate.add_argument("--top-p", type=float, help="sample among tokens of this probability")
    generate.add_argument("--seed", type=int, default=0, help="of the samples")
    generate.add_argument(
        "--device", help="such as cpu or cuda:0 (default: a GPU where there is one)"
    )

    command("info", _info, "versions, devices, and which backend computes the SSD on them")
    return parser


def _recipes(arguments: argparse.Namespace) -> int:
    import yaml

    from mamba2_apps import catalog

    recipes = catalog.shipped()
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        description = yaml.safe_load(path.read_text(encoding="utf-8"))["description"]
        print(f"{name:<{width}}  {description}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if arguments.help and arguments.recipe is None:
        arguments.parser.print_help()
        return 0
    if (arguments.recipe is None) == (arguments.resume is None):
        raise ValueError(
            f"train takes a RECIPE or --resume RUN; `{PROG} recipes` lists the recipes"
        )
    if arguments.resume is not None:
        if arguments.run is not None or arguments.backbone is not None:
            raise ValueError("--resume continues a run where it is; leave out --run and --backbone")
        words = _train_overrides(arguments)
        return _trained(arguments.resume, lambda run: _runs().resume(run, words))

    from mamba2_apps import catalog

    path = catalog.find(arguments.recipe)
    if arguments.help:
        from mamba2_apps import recipes

        print(recipes.help_text(path))
        return 0
    run = arguments.run or _agreed_run(arguments.recipe)
    words = _train_overrides(arguments)
    return _trained(run, lambda run: _runs().train(path, run, words))


def _train_overrides(arguments: argparse.Namespace) -> list[str]:
    """The recipe's keys of the command line, those that have short names among them."""
    words = list(arguments.overrides)
    if arguments.backbone is not None:
        words.append(f"--adaptation.start={arguments.backbone}")
    if arguments.parallel is not None:
        words.append(f"--trainer.parallel={arguments.parallel}")
    if arguments.strict:
        words.append("--data.strict=true")
    return words


def _trained(run: Path, job: Callable[[Path], dict[str, Any]]) -> int:
    try:
        metrics = job(run)
    except KeyboardInterrupt:
        print(
            f"\n{PROG}: interrupted; continue with `{PROG} train --resume {run}`", file=sys.stderr
        )
        return 130

    if not metrics:
        return 0  # a process beside the one that reports

    from mamba2_apps import reports

    chosen = metrics["best_epoch"]["epoch"]
    print(f"\ntest, with the weights of epoch {chosen} of {metrics['epochs']}:")
    print(reports.comparison_table(metrics["test"], metrics["baselines"]))
    print(f"\n{metrics['parameters']:,} parameters, {metrics['seconds']:.0f} s; results in {run}:")
    for file in sorted(path.name for path in run.iterdir() if not path.name.startswith(".")):
        print(f"  {file}")
    print(f"predict with: {PROG} predict {run} INPUT...")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    for name, value in _runs().evaluate(arguments.run).items():
        print(f"{name:<20} {value:.4f}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from mamba2_apps import predictor

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}, expected at least 1")
    model = predictor.load(arguments.run, arguments.device)
    answerer = model.preprocessing.answerer(
        arguments.inputs, output=arguments.output, stream=arguments.stream
    )
    if answerer is None:
        return _predict_batches(model, arguments)
    words = list(arguments.overrides)
    if arguments.stream and arguments.format is not None:
        words.append(f"--format={arguments.format}")
    if arguments.top_k is not None:
        words.append(f"--top-k={arguments.top_k}")
    answers = answerer(model.task, **_options_of(answerer, words))
    suffix = arguments.output.suffix.lower() if arguments.output is not None else ""
    if suffix and suffix in model.preprocessing.suffixes:
        for _ in answers:
            pass  # the answerer writes the file itself
        return 0
    layout = "jsonl" if arguments.stream else _layout(arguments)
    with _output(arguments.output) as file:
        _write_answers(answers, file, layout)
    return 0


def _predict_batches(model: Any, arguments: argparse.Namespace) -> int:
    if arguments.overrides:
        raise ValueError(f"unknown argument {arguments.overrides[0]!r}; see {PROG} predict --help")
    unreadable = 0

    def report(error: Exception) -> None:
        nonlocal unreadable
        unreadable += 1
        print(f"{PROG}: {error}", file=sys.stderr)

    items = model.find(arguments.inputs, report)
    inputs = len(items) + unreadable
    answers = model.iterate(items, batch_size=arguments.batch_size, on_error=report)
    if arguments.top_k is not None:
        answers = (_likeliest(answer, arguments.top_k) for answer in answers)
    layout = _layout(arguments)
    first = list(islice(answers, 1))
    if first:  # else no file appears, and none is emptied
        with _output(arguments.output) as file:
            _write_answers(chain(first, answers), file, layout)
    if unreadable:
        print(f"{PROG}: {unreadable} of {inputs} inputs could not be read", file=sys.stderr)
    return 0 if first else 1


def _embed(arguments: argparse.Namespace) -> int:
    import numpy as np

    from mamba2_apps import predictor
    from mamba2_apps.files import replacing

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}, expected at least 1")
    model = predictor.load(arguments.run, arguments.device)
    items = model.find(arguments.inputs)
    names, vectors = model.embed_named(
        items,
        batch_size=arguments.batch_size,
        on_error=lambda error: print(f"{PROG}: {error}", file=sys.stderr),
    )
    with replacing(arguments.output) as partial, partial.open("wb") as file:
        np.savez(file, inputs=np.array(names), embeddings=vectors)
    print(f"{arguments.output}: inputs ({len(names)},), embeddings {vectors.shape}")
    if len(names) < len(items):
        left = len(items) - len(names)
        print(f"{PROG}: {left} of {len(items)} inputs could not be read", file=sys.stderr)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from mamba2_apps import export

    suffix = export.SUFFIXES[arguments.format]
    output = arguments.output or arguments.run / "export" / f"model{suffix}"
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{output}: {export.export(arguments.run, output, arguments.format)}")
    return 0


def _options_of(function: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    """`--key=value` words as the keyword arguments of a function, typed by its signature.

    Raises ValueError that lists the options for an unknown key, or names a value of a wrong type.
    """
    from inspect import signature
    from typing import get_type_hints

    from jsonargparse import ArgumentError, ArgumentParser

    hints, parameters = get_type_hints(function), dict(signature(function).parameters)
    parameters.pop(next(iter(parameters)))  # the task
    parser = ArgumentParser(prog=f"{PROG} predict", exit_on_error=False)
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty
        rest: dict[str, Any] = {"required": True} if required else {"default": parameter.default}
        parser.add_argument(f"--{key}", type=hints[key], **rest)
    for word in words:
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if key not in parameters or not word.startswith("--"):
            options = ", ".join(f"--{key.replace('_', '-')}" for key in parameters) or "none"
            raise ValueError(
                f"unknown argument {word!r}; this prediction takes the options {options}"
            )
    try:
        found = parser.parse_args(
            [f"--{w[2:].partition('=')[0].replace('-', '_')}={w.partition('=')[2]}" for w in words]
        )
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return found.as_dict()


def _layout(arguments: argparse.Namespace) -> str:
    if arguments.format not in (None, "csv", "jsonl"):
        raise ValueError(f"--format is {arguments.format!r}, expected csv or jsonl")
    suffix = arguments.output.suffix if arguments.output else ""
    return arguments.format or ("jsonl" if suffix in (".jsonl", ".json") else "csv")


def _likeliest(answer: dict[str, Any], count: int) -> dict[str, Any]:
    """A classifier's answer with its `count` likeliest labels, in order, in place of all."""
    if count < 1 or "probabilities" not in answer:
        raise ValueError(
            f"--top-k is {count}, expected at least 1, with a run that gives probabilities"
        )
    ranked = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])[:count]
    rest = {key: value for key, value in answer.items() if key != "probabilities"}
    return rest | {"top": [{"label": name, "probability": share} for name, share in ranked]}


def _write_answers(answers: Iterable[dict[str, Any]], file: TextIO, layout: str) -> None:
    """JSON lines, or CSV whose columns spell nested names with a dot and whose events are JSON; a
    line per answer.
    """
    if layout == "jsonl":
        for answer in answers:
            file.write(json.dumps(answer) + "\n")
            file.flush()  # a stream's reader waits for each line
        return
    writer = None
    for answer in answers:
        row = dict(_flat(answer))
        if writer is None:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)


def _flat(answer: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in answer.items():
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            # Every row has as many of the likeliest, but events of a number of its own.
            ranks = {str(rank): item for rank, item in enumerate(value, 1)}
            value = ranks if key == "top" else json.dumps(value)
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else value


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when all of it is written."""
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    from mamba2_apps.files import replacing

    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        yield file


def _generate(arguments: argparse.Namespace) -> int:
    import torch

    from mamba2_apps import language
    from mamba2_apps.predictor import device_of

    device = device_of(arguments.device)
    tokenizer = language.load_tokenizer(arguments.checkpoint)
    model = language.LanguageModel.from_pretrained(arguments.checkpoint, device=device)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("--prompt is empty; a language model continues what it is given")
    ends = [] if arguments.ignore_eos else language.end_tokens(arguments.checkpoint, tokenizer)
    tokens = model.generate(
        torch.tensor([ids], device=device),
        arguments.max_new_tokens,
        stop=ends,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        generator=torch.Generator(device).manual_seed(arguments.seed),
    )
    sys.stdout.write(prompt)
    for piece in language.text_pieces(tokenizer, ids, tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0


def _info(arguments: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from mamba2_apps.kernels import dispatch

    print(f"{'python':<14} {platform.python_version()}")
    names = ("mamba2-apps", "torch", "triton", "timm", "lightning", "torchmetrics", "jsonargparse")
    for name in (*names, "safetensors", "scikit-learn", "numpy"):
        try:
            print(f"{name:<14} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<14} not installed")
    print(
        f"{'cpu':<14} {torch.get_num_threads()} threads; backend {dispatch.describe_backend('cpu')}"
    )
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        backend = dispatch.describe_backend(f"cuda:{index}")
        print(f"{f'cuda:{index}':<14} {name}; backend {backend}")
    if not torch.cuda.is_available():
        print(f"{'cuda':<14} no device")
    return 0


def _runs() -> Any:
    from mamba2_apps import runs

    return runs


def _agreed_run(recipe: str) -> Path:
    """A new directory, the same for every process of a training on several devices."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("under torchrun the processes need one directory: give --run DIR")
    # Lightning starts the other processes with our environment and the same command.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ["MAMBA2_APPS_RUN"] = str(_new_run(recipe))
    return Path(os.environ["MAMBA2_APPS_RUN"])


def _new_run(recipe: str) -> Path:
    """The first free directory runs/<name>-<number>."""
    path = Path(recipe)
    stem = path.stem if path.suffix in (".yaml", ".yml") else recipe.replace("/", "-")
    number = 1
    while (run := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return run


if __name__ == "__main__":
    sys.exit(main())
