"""Two pictures of a run: how it learned, and which classes it mixes up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from hfbench.errors.harmless import for_terminal
from hfbench.machine.bounds import parse_json

_LONGEST_NAME = 40  # letters
_NAMED_CLASSES = 20  # more names than this cannot be read along an axis


def plot_curves(log_file: Path, title: str, path: Path) -> None:
    """Draw training loss and test accuracy over epochs.

    Args:
        log_file: ``log.jsonl`` of a run.
        title: Above the picture.
        path: PNG to write.
    """
    from matplotlib.figure import Figure  # takes 0.4 s, for which training need not wait

    entries = list(_entries(log_file))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    figure.suptitle(for_terminal(title), parse_math=False)
    for name, label in (("loss", "training"), ("eval_loss", "test")):
        losses.plot(*_series(entries, name), marker=".", label=label)
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    losses.legend()
    for name, label in (("eval_accuracy", "accuracy"), ("eval_f1_macro", "F1 macro")):
        epochs, values = _series(entries, name)
        accuracies.plot(
            epochs, [100 * value for value in values], marker="o", label=f"test {label}"
        )
    accuracies.set(xlabel="epoch", ylabel="%")
    accuracies.legend()
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_confusion(
    labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str], path: Path
) -> None:
    """Draw the confusion matrix of the test images.

    Args:
        labels: int, (N,): true classes.
        predictions: int, (N,): predicted classes.
        label_names: Name of each class.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    classes = len(label_names)
    counts = confusion_matrix(labels, predictions, labels=range(classes))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="predicted", ylabel="true class", title="Test images, % of each true class")
    if classes <= _NAMED_CLASSES:
        names = [_short(name) for name in label_names]
        axes.set_xticks(range(classes), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                color = "white" if share[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(picture, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=120)


def _short(name: str) -> str:
    """Return a class's name as it can stand beside an axis; it is text, and no formula."""
    text = for_terminal(name).replace("\n", " ")
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…"


def _entries(log_file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log that can be read: a full disk may have cost some."""
    lines = log_file.read_bytes().splitlines() if log_file.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = parse_json(line)
            if isinstance(entry, dict) and "epoch" in entry:
                yield entry


def _series(entries: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    found = [(entry["epoch"], entry[name]) for entry in entries if entry.get(name) is not None]
    return [epoch for epoch, _ in found], [value for _, value in found]
