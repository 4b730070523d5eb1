"""How long the published scoring job would take at the speed of a row of the ladder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Row = Mapping[str, str]

# CIFAR-10 in the GUDA paper: the network, and the base and 10 models on 2,048 images at 399 timesteps.
PUBLISHED = "guda-cifar10"
PUBLISHED_FORWARDS = 11 * 2048 * 399


def projections(rows: Sequence[Row], matmul: Row | None) -> Iterator[str]:
    """A line for each row on the published network with dense deltas.

    matmul: the ceiling's row, for the share of it that is reached
    """
    for row in rows:
        if row["op"] != "score" or not row["shapes"].startswith(f"{PUBLISHED} dense,"):
            continue
        minutes = PUBLISHED_FORWARDS / _forwards(row) * float(row["median_ms"]) / 6e4
        line = f"- {row['backend']}, {row['dtype']}: {minutes:.3g} min, {row['tflop_per_s']} TFLOP/s"
        if matmul is not None:
            share = float(row["tflop_per_s"]) / float(matmul["tflop_per_s"])
            line += f", {100 * share:.0f} % of the {matmul['dtype']} matrix product"
        yield line


def _forwards(row: Row) -> int:
    sizes = {key: int(value) for key, _, value in (part.partition("=") for part in row["shapes"].split()) if value}
    return (sizes["K"] + 1) * sizes["N"] * sizes["D"]
