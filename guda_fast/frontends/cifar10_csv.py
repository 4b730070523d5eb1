"""The CSV files of the CIFAR scripts: one row a cell, and the classes of each image by falling score."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from guda_fast._files import atomic_write
from guda_fast.diffusion.schedule import FloatArray

CLASSES = {"cifar10": 10, "cifar100": 100}
_NAMES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_scores(path: Path, images: Sequence[str], classes: Sequence[int], scores: FloatArray) -> Path:
    """Write ``image,class_id,delta_elbo`` and, beside it, the sorted file; each appears whole or not at all.

    path: ends in .csv. images: full paths [N]. classes: numbers of the columns, rising [K].
    scores: rounded to float32, as the script has them [(N, K), float64]

    Returns the path of the sorted file.
    """
    rounded = scores.astype(np.float32).astype(np.float64)
    rows = sorted(zip(images, rounded.tolist(), strict=True))
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class_id", "delta_elbo"])
        for image, row in rows:
            writer.writerows([image, number, repr(score)] for number, score in zip(classes, row, strict=True))
    return path.with_name(f"{path.stem}_sorted.csv")


def write_sorted(path: Path, images: Sequence[str], classes: Sequence[int], scores: FloatArray, columns: int) -> None:
    """Write each image's classes by falling score, the lower class first where scores are equal.

    path, images, classes, scores: as for `write_scores`. columns: classes of the header; those without a score are
    left empty at the end.
    """
    rounded = scores.astype(np.float32).astype(np.float64)
    with atomic_write(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"R{rank}_{what}" for rank in range(1, columns + 1) for what in _COLUMNS)])
        for image, row in sorted(zip(images, rounded.tolist(), strict=True)):
            ranked = sorted(zip(classes, row, strict=True), key=lambda cell: -cell[1])
            cells = [text for number, score in ranked for text in _cell(number, score, columns)]
            writer.writerow([Path(image).name, *cells, *[""] * (3 * (columns - len(classes)))])


_COLUMNS = ("Cls", "Name", "Sc")


def _cell(number: int, score: float, columns: int) -> tuple[int, str, str]:
    # The script takes the names of CIFAR-100 from torchvision, and their numbers without it.
    name = _NAMES[number] if columns == len(_NAMES) else str(number)
    if abs(score) < 1e-6 and score != 0:
        text = f"{score:.6e}"
    else:
        text = f"{score:.6f}" if abs(score) < 1e-3 else f"{score:.4f}"
    return number, f"{number}: {name}", text


def with_zeros(scores: Mapping[int, FloatArray], classes: int, images: int) -> FloatArray:
    """All classes' columns, zero where no model was scored: what single-class mode writes [(N, classes), float64]."""
    full = np.zeros((images, classes))
    for number, column in scores.items():
        full[:, number] = column
    return full
