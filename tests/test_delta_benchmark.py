"""The benchmark of the delta ops: all contenders of a case do the same job."""

from __future__ import annotations

import pytest
import torch

from benchmarks import delta_ops


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_agree(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    torch.manual_seed(0)
    cases = [make_case() for make_case in delta_ops.BENCHMARK.cases(True)]
    chosen = [case for case in cases if case.dtype == dtype]
    assert len({(case.op, case.shapes) for case in chosen}) > 8
    for case in chosen:
        expected = case.rival.call(1)
        assert isinstance(expected, torch.Tensor)
        for contender in case.contenders:
            result = contender.call(1)
            assert isinstance(result, torch.Tensor)
            # Sums of at most 40 products of normals; in bfloat16 merging rounds the weight to 8 bits.
            unit = 2.0**-24 if dtype == "float32" else 2.0**-8
            assert result.shape == expected.shape
            assert float((result - expected).square().mean().sqrt()) <= 4 * unit * float(
                expected.square().mean().sqrt()
            )
