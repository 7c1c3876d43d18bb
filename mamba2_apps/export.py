"""Files of a trained model that other programs read: safetensors, torch.export and ONNX.

A graph is traced on the CPU with one example of the run's preprocessing; its batch axis stays free.
What it computes is compared with the model before the file appears.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mamba2_apps import runs
from mamba2_apps.data import Preprocessing
from mamba2_apps.files import replacing

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-4


def export(run: Path, output: Path, layout: str) -> str:
    """Write a RUN's model into the file `output`, and say in a line what is in it.

    Args:
        run: a finished RUN.
        output: the file; it appears when it is whole and has been checked.
        layout: safetensors: weights, with labels and preprocessing as JSON in the file's metadata;
            torch: a program for torch.export.load; onnx: a graph for any ONNX runtime. A program
            or a graph gives what the model gives (logits, say) and needs neither this package nor
            a fixed batch size.

    Raises:
        ValueError: an unknown layout, a RUN that is not whole, a domain whose inputs have no one
            shape, or a package that is missing.
        RuntimeError: the file's answers are not the model's to 1e-4.
    """
    if layout not in SUFFIXES:
        raise ValueError(f"--format is {layout!r}, expected one of {', '.join(SUFFIXES)}")
    if layout == "onnx" and (missing := [n for n in _ONNX_PACKAGES if find_spec(n) is None]):
        raise ValueError(
            f"ONNX export needs {', '.join(missing)}: pip install 'mamba2-apps[export]'"
        )
    task = runs.read_task(run, runs.read_recipe(run))
    preprocessing = runs.read_preprocessing(run)
    if layout == "safetensors":
        return _write_weights(task.model, task.labels, preprocessing, output)
    examples = [_example(preprocessing, size) for size in (2, 1, 3)]
    program = trace(task.model, examples[0])
    with replacing(output) as partial:
        call = (_write_onnx if layout == "onnx" else _write_program)(program, partial)
        error = max(_error(call, task.model, inputs) for inputs in examples)
        if not error < TOLERANCE:
            raise RuntimeError(
                f"the {layout} file's answers differ from the model's by {error:.1e}, expected "
                f"below {TOLERANCE:.0e}; it was not written"
            )
    shapes = ", ".join(f"{n} {_shape(t)}" for n, t in zip(_NAMES, examples[0], strict=False))
    return f"{shapes} to outputs {_shape(call(examples[0]))}; equal to the model within {error:.0e}"


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The model in evaluation mode as a graph of ATen operations, its batch axis free.

    inputs: (inputs,) or (inputs, mask), each with a leading batch axis of at least 2.
    """
    free = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=free, strict=False)


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_NAMES = ("inputs", "mask")


def _write_weights(
    model: nn.Module, labels: list[str], preprocessing: Preprocessing, output: Path
) -> str:
    # Under the names that others know: a timm model's own, not those of what wraps it here.
    portable = getattr(model, "portable", model)
    metadata = {
        "format": "pt",
        "labels": json.dumps(labels),
        "preprocessing": json.dumps(asdict(preprocessing)),  # type: ignore[call-overload]
    }
    with replacing(output) as partial:
        safetensors.torch.save_model(portable, str(partial), metadata=metadata)
    count = sum(p.numel() for p in portable.parameters())
    return f"{count:,} parameters, with labels and preprocessing in the metadata"


def _write_program(
    program: torch.export.ExportedProgram, path: Path
) -> Callable[[Sequence[Tensor]], Tensor]:
    with TemporaryDirectory() as folder:  # torch insists on the suffix
        whole = Path(folder) / f"model{SUFFIXES['torch']}"
        torch.export.save(program, whole)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            module = torch.export.load(whole).module()
        copyfile(whole, path)
    return lambda inputs: module(*inputs)


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path
) -> Callable[[Sequence[Tensor]], Tensor]:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        graph: Any = torch.onnx.export(
            program, dynamo=True, output_names=["outputs"], external_data=False, verbose=False
        )
    graph.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def call(inputs: Sequence[Tensor]) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return call


def _example(preprocessing: Preprocessing, size: int) -> tuple[Tensor, ...]:
    """A batch of the example, (inputs,) or (inputs, mask), with noise on what is continuous."""
    batch = preprocessing.collate([preprocessing.example() for _ in range(size)])
    draw = torch.Generator().manual_seed(size)
    inputs = batch["inputs"]
    if inputs.is_floating_point():
        inputs = inputs + torch.randn(inputs.shape, generator=draw)
    return (inputs, batch["mask"]) if "mask" in batch else (inputs,)


@torch.no_grad()
def _error(
    call: Callable[[Sequence[Tensor]], Tensor], model: nn.Module, inputs: tuple[Tensor, ...]
) -> float:
    expected = model(*inputs)
    return float((call(inputs) - expected).norm() / expected.norm())


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(['batch', *map(str, tensor.shape[1:])])})"
