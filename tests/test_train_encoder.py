"""The encoder of the agreement benchmarks: its views, its loss, and the folder that compare takes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.agreement import train_encoder
from guda_fast.baselines import embed, transformers_encoder
from guda_fast.datasets import open_dataset


def test_contrast_loss_is_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, generator=generator).double()
    views = [row / row.norm() for row in (*first, *second)]
    terms = []
    for i, view in enumerate(views):
        weights = {j: math.exp(float(view @ other) / train_encoder.TEMPERATURE) for j, other in enumerate(views)}
        del weights[i]
        terms.append(-math.log(weights[(i + 3) % 6] / sum(weights.values())))
    torch.testing.assert_close(
        train_encoder.contrast_loss(first, second), torch.tensor(math.fsum(terms) / 6, dtype=torch.float64)
    )


def test_views_without_changes_are_the_image(monkeypatch) -> None:
    for name in ("DEGREES", "SCALE", "SHIFT", "NOISE", "CONTRAST"):
        monkeypatch.setattr(train_encoder, name, 0.0)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(train_encoder.views(images, torch.Generator()), images, rtol=0, atol=1e-5)


def test_a_shift_is_a_share_of_the_side(monkeypatch) -> None:
    for name in ("DEGREES", "SCALE", "NOISE", "CONTRAST"):
        monkeypatch.setattr(train_encoder, name, 0.0)
    images = torch.zeros(200, 1, 8, 8)
    images[:, :, 3:5, 3:5] = 1.0
    moved = train_encoder.views(images, torch.Generator().manual_seed(0)).clamp_min(0)[:, 0]
    centre = (moved.sum(dim=1) @ torch.arange(8.0)) / moved.sum(dim=(1, 2)) - 3.5
    assert 0.9 < float(centre.abs().max()) <= 8 * train_encoder.SHIFT + 1e-4


def test_votes() -> None:
    known = torch.eye(2).repeat_interleave(6, dim=0)
    groups = torch.arange(2).repeat_interleave(6)
    asked = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.2]])
    assert train_encoder.vote_accuracy(known, groups, asked, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_the_folder_is_one_that_compare_takes(tmp_path, monkeypatch, capsys) -> None:
    arguments = ["digits", str(tmp_path), "--steps", "2", "--batch", "8", "--layers", "1"]
    monkeypatch.setattr("sys.argv", ["train_encoder", *arguments])
    train_encoder.main()
    assert "nearest neighbours by features" in capsys.readouterr().out
    images = open_dataset("digits").take(torch.arange(3))
    features = embed(images, transformers_encoder(tmp_path))
    assert features.shape[0] == 3 and bool(torch.isfinite(features).all())
    train_encoder.main()
    torch.testing.assert_close(embed(images, transformers_encoder(tmp_path)), features, rtol=0, atol=0)
