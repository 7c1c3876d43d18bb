"""Pictures for people: a test's most confident mistakes, and what answers hang on.

Dimensions: batch b · channels c · height H · width W · classes k
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from mamba2_apps.files import replacing
from mamba2_apps.tasks import Classification, MultiLabel, Task

if TYPE_CHECKING:
    from mamba2_apps.vision.data import Pictures

MISTAKES = 24
MOST_PHOTOS = 12
"""A picture of more would show nothing."""


def pictures_of_a_test(task: Any, test_set: Dataset[Any], preprocessing: Any, folder: Path) -> None:
    """Write mistakes.png and saliency.png of a classifier's last test into a RUN.

    Args:
        task: a Classification, tested on `test_set`.
        test_set: the images, in the order of the test.
        preprocessing: turns inputs back into pixels.
        folder: the RUN.
    """
    probabilities = task.test_outputs().softmax(-1)
    targets = torch.as_tensor(np.asarray(test_set.targets))  # type: ignore[attr-defined]
    confidence, guesses = probabilities.max(-1)
    wrong = (guesses != targets).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES].tolist()
    labels = task.labels
    if worst:
        pixels = [preprocessing.pixels(test_set[i]["inputs"]).numpy() for i in worst]
        titles = [
            f"{labels[guesses[i]]} {confidence[i]:.0%}\nis {labels[targets[i]]}" for i in worst
        ]
        contact_sheet(pixels, titles, f"{len(wrong)} of {len(targets)} wrong", folder)
    # The surest answer for each of a few classes, and the surest mistake: what spoke for it.
    right = [(targets == k) & (guesses == k) for k in targets.unique()]
    shown = [int((confidence * hits).argmax()) for hits in right if hits.any()][:5]
    images = torch.stack([test_set[i]["inputs"] for i in [*shown, *worst[:1]]])
    maps, answers = saliency(task.model, images)
    titles = [task.labels[k] for k in answers]
    draw_saliency(preprocessing.pixels(images).numpy(), maps, titles, folder / "saliency.png")


def answerer(
    preprocessing: "Pictures", sources: Sequence[str], output: Path
) -> Callable[..., Iterator[dict[str, Any]]]:
    """What `mamba2-apps predict RUN PHOTO --output MAP.png` does."""

    def answer(task: Task, *, label: str | None = None) -> Iterator[dict[str, Any]]:
        """Draw photos beside what the answers to them hang on.

        Args:
            task: a RUN's task.
            label: what would speak for this one; each photo's likeliest where it is not given.
        """
        if not isinstance(task, Classification | MultiLabel):
            raise ValueError(f"a RUN of {type(task).__name__} has no labels to draw a map for")
        if label is not None and label not in task.labels:
            raise ValueError(f"--label is {label!r}, expected one of {', '.join(task.labels)}")
        items = [item for source in sources for item in preprocessing.find(source)]
        if len(items) > MOST_PHOTOS:
            raise ValueError(f"{len(items)} photos; a picture shows {MOST_PHOTOS} at most")
        images = torch.stack([preprocessing(item) for item in items])
        chosen = None if label is None else task.labels.index(label)
        maps, answers = saliency(task.model, images, chosen)
        titles = [
            f"{Path(item).name}\n{task.labels[k]}" for item, k in zip(items, answers, strict=True)
        ]
        draw_saliency(preprocessing.pixels(images).numpy(), maps, titles, output)
        yield from ()

    return answer


def contact_sheet(
    pixels: Sequence[np.ndarray], titles: Sequence[str], heading: str, folder: Path
) -> None:
    """Draw images (H, W, c) from 0 to 1, the most confident mistake first, into mistakes.png."""
    columns = min(6, len(pixels))
    rows = -(-len(pixels) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows + 0.4), layout="constrained")
    for axis in np.atleast_1d(figure.subplots(rows, columns)).flat:
        axis.set_axis_off()
    for axis, image, title in zip(figure.axes, pixels, titles, strict=False):
        _show(axis, image)
        axis.set_title(title, fontsize=8)
    figure.suptitle(f"The most confident mistakes: {heading}", fontsize=10)
    _save(figure, folder / "mistakes.png")


def draw_saliency(pixels: np.ndarray, maps: Tensor, titles: Sequence[str], path: Path) -> None:
    """Draw images (b, H, W, c) from 0 to 1 above their maps (b, H, W)."""
    figure = Figure(figsize=(max(1.7 * len(pixels), 2.6), 4.1), layout="constrained")
    axes = figure.subplots(2, len(pixels), squeeze=False)
    for column, (image, shade, title) in enumerate(zip(pixels, maps, titles, strict=True)):
        _show(axes[0, column], image)
        axes[0, column].set_title(title, fontsize=8)
        axes[1, column].imshow(shade.numpy(), cmap="magma", vmin=0, vmax=1)
        for axis in axes[:, column]:
            axis.set_axis_off()
    figure.suptitle("What each answer hangs on", fontsize=10)
    _save(figure, path)


def saliency(
    model: torch.nn.Module,
    images: Tensor,
    answer: int | None = None,
    samples: int = 16,
    noise: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """How much each pixel moves the answer: SmoothGrad (Smilkov et al. 2017, arXiv:1706.03825).

    The gradient of a logit, averaged over noisy copies of an image, as its size over the channels,
    blurred a little and scaled to at most 1.

    Args:
        model: (images, mask) -> logits (b, k), in evaluation mode.
        images: (b, c, H, W), normalised.
        answer: whose logit; None: the greatest of each image.
        samples: noisy copies.
        noise: their deviation, as a share of the image's range.

    Returns:
        maps (b, H, W) and answers (b,), on the CPU.
    """
    device = next(model.parameters()).device
    images = images.to(device)
    draw = torch.Generator().manual_seed(0)
    span = (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)) * noise
    with torch.no_grad():
        answers = model(images, None).argmax(-1)
    if answer is not None:
        answers = torch.full_like(answers, answer)
    total = torch.zeros_like(images)
    for _ in range(samples):
        with torch.enable_grad():
            noisy = images + span * torch.randn(images.shape, generator=draw).to(device)
            logits = model(noisy.requires_grad_(), None).float()
            chosen = logits.gather(1, answers[:, None]).sum()
            total += torch.autograd.grad(chosen, noisy)[0]
    size = total.abs().sum(1, keepdim=True)
    size = F.avg_pool2d(size, 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    return (size / size.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu(), answers.cpu()


def _show(axis: Any, image: np.ndarray) -> None:
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
