"""h = x + addend; n = (h - mean) / sqrt(variance + eps) per row and group; y = (n weight + bias) (1 + scale) + shift;
out = y sigmoid(y), or y.

A map that fits into a program's registers is read once and written once: one program a row and block of groups. A
larger one takes two kernels, statistics of chunks of positions and then the rest, and is read twice. Which, and every
size of a block, depends on the shape of one row alone, so that other rows change no bit and a launch can be captured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides when a kernel is defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)
MAX_CHUNKS = 32  # of a row, each with its own statistics


class Config(NamedTuple):
    """How a row is cut up; changes results in their last digits, by the order of sums."""

    groups: int  # of a program, a power of two
    positions: int  # of a tile, a power of two
    tiles: int  # one after another in a program of the two kernels; 0 where one kernel does all
    warps: int


class _Limits(NamedTuple):
    channels: int  # next to each other, at least: a sector of memory has 32 bytes
    whole: int  # elements of a tile that holds a whole map, at most
    tile: int  # elements of a tile, where there is a choice
    thread: int  # elements of a thread


# By bytes an element. With these two programs of the largest kind fit on a multiprocessor, so that one reads while the
# other computes.
_LIMITS = {2: _Limits(16, 16384, 2048, 32), 4: _Limits(8, 16384, 2048, 16)}
_MAX_WARPS = 16
_REGISTERS = 64  # of a thread at most, where a program has that many warps and two-byte elements


def configuration(positions: int, channels: int, groups: int, element_size: int) -> Config:
    """From the shape of one row; never from the number of rows."""
    limits, width = _LIMITS[element_size], channels // groups
    lanes, all_positions = triton.next_power_of_2(width), triton.next_power_of_2(positions)
    most = triton.next_power_of_2(groups)
    count = min(most, triton.next_power_of_2(triton.cdiv(limits.channels, width)))
    if all_positions * count * lanes <= limits.whole:
        while count < most and 2 * all_positions * count * lanes <= limits.tile:
            count *= 2
        return Config(count, all_positions, 0, _warps(all_positions * count * lanes, limits))
    while count < most and 2 * count * lanes <= 4 * limits.channels:
        count *= 2
    tile_positions = min(all_positions, max(1, 8 * 32 * limits.thread // (count * lanes)))  # eight warps
    tiles = triton.cdiv(positions, tile_positions * MAX_CHUNKS)
    return Config(count, tile_positions, tiles, _warps(tile_positions * count * lanes, limits))


def _warps(elements: int, limits: _Limits) -> int:
    return min(_MAX_WARPS, max(1, elements // (32 * limits.thread)))


def launch_options(config: Config, element_size: int) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": config.warps, "enable_fp_fusion": True}
    if config.tiles == 0 and config.warps == _MAX_WARPS and element_size == 2:
        options["maxnreg"] = _REGISTERS
    return options


def is_full(config: Config, positions: int, channels: int, groups: int) -> bool:
    """Whether every tile is."""
    width = channels // groups
    return positions % config.positions == 0 and groups % config.groups == 0 and width & (width - 1) == 0


@triton.jit
def _place(groups, chunks, GROUPS: tl.constexpr):
    """A program's first group, its chunk of positions and its row. Neighbours share positions, and so memory pages."""
    blocks = tl.cdiv(groups, GROUPS)
    block, rest = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    return block * GROUPS, rest % chunks, rest // chunks


@triton.jit
def _channels(first_group, groups, WIDTH: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr):
    """The channels of GROUPS groups, each padded to LANES; which lanes hold one."""
    lane = tl.arange(0, GROUPS * LANES)
    if WIDTH == LANES:
        channel = first_group * WIDTH + lane
        is_channel = channel < groups * WIDTH
    else:
        group, within = first_group + lane // LANES, lane % LANES
        channel = group * WIDTH + within
        is_channel = (within < WIDTH) & (group < groups)
    return channel, is_channel


@triton.jit
def _vector(vector, offset, channel, is_channel):
    return tl.load(vector + offset + channel, mask=is_channel, other=0.0).to(tl.float32)


@triton.jit
def _group_sums(tile, GROUPS: tl.constexpr):
    """(P, C) to (G,): one position's channels in float32, the positions in float64."""
    LANES: tl.constexpr = tile.shape[1] // GROUPS
    per_position = tl.sum(tl.reshape(tile, (tile.shape[0], GROUPS, LANES)), axis=2)
    return tl.sum(per_position.to(tl.float64), axis=0).to(tl.float32)


@triton.jit
def _to_lanes(per_group, LANES: tl.constexpr):
    spread = tl.broadcast_to(tl.expand_dims(per_group, 1), (per_group.shape[0], LANES))
    return tl.reshape(spread, (per_group.shape[0] * LANES,))


@triton.jit
def _mask(is_position, is_channel, FULL: tl.constexpr):
    """Which elements of a tile are the map's; None where all are, which spares every mask."""
    return None if FULL else is_position[:, None] & is_channel[None, :]


@triton.jit
def _load(at, inside):
    tile = tl.load(at) if inside is None else tl.load(at, mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _masked(h, inside):
    """With zeros outside."""
    return h if inside is None else tl.where(inside, h, 0.0)


@triton.jit
def _statistics(h, inside, count, GROUPS: tl.constexpr):
    """Of a tile (P, C) with zeros outside, and the number of elements of a group in it.

    Returns the tile less its groups' means, rounded; the means (G,), rounded, and what is left of them; the sums of
    squared deviations from them. As differences come first, a mean of any size costs no digits.
    """
    LANES: tl.constexpr = h.shape[1] // GROUPS
    mean = _group_sums(h, GROUPS) / count
    h = _masked(h - tl.expand_dims(_to_lanes(mean, LANES), 0), inside)
    rest = _group_sums(h, GROUPS) / count
    return h, mean, rest, _group_sums(h * h, GROUPS) - count * (rest * rest)


@triton.jit
def _silu(y, EXACT: tl.constexpr):
    if EXACT:
        # Below -87 the value at -87, which is -1e-36, stands for all: the limit is zero.
        y = tl.where(y < -87.0, -87.0, y)
        # Cody and Waite's reduction and the polynomial of Cephes' expf; tl.exp is too rough where y is large.
        bounded = tl.where(y > 87.0, 87.0, y)
        shifted = bounded * -1.44269504088896341 + 12582912.0  # has the integer in its low bits
        n = shifted - 12582912.0
        r = (bounded + n * 0.693359375) + n * -2.12194440e-4  # of e^-r
        p = r * 1.9875691500e-4 - 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r - 4.1665795894e-2
        p = p * r + 1.6666665459e-1
        p = p * r - 5.0000001201e-1
        p = 1.0 - (p * (r * r) + r)
        power = (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
        return tl.div_rn(y, 1.0 + power)
    # Two instructions where a quotient takes six, with 22 good bits for a result of 11.
    root = tl.rsqrt(1.0 + tl.exp2(y * -1.44269504088896341))
    return y * root * root


@triton.jit
def _affine(
    less, deviation,  # (C,) what h has to lose, and 1 / sqrt(variance + eps), a lane each
    weight, bias, model_index, scale, shift, row, channels, scale_row, shift_row, channel, is_channel,
):  # fmt: skip
    """What makes y of h: y = (h factor + summand) after + last, where the last two may be None."""
    factor, last, after, model = deviation, None, None, row * 0
    if model_index is not None:
        model = tl.load(model_index + row)
    if weight is not None:
        factor = factor * _vector(weight, model * channels, channel, is_channel)
    summand = -less * factor
    if bias is not None:
        summand += _vector(bias, model * channels, channel, is_channel)
    # In eager's order: products with 1 + scale in front would round what may cancel.
    if scale is not None:
        after = 1.0 + _vector(scale, row * scale_row, channel, is_channel)
    if shift is not None:
        last = _vector(shift, row * shift_row, channel, is_channel)
    return factor, summand, after, last


@triton.jit
def _finish(out, at, inside, h, factor, summand, after, last, SILU: tl.constexpr, ROUND_BY_HAND: tl.constexpr):
    y = h * factor[None, :] + summand[None, :]
    if after is not None:
        y = y * after[None, :]
    if last is not None:
        y = y + last[None, :]
    if SILU:
        y = _silu(y, out.dtype.element_ty == tl.float32)
    # The interpreter cuts bfloat16 off: rounding to the nearest before leaves nothing to cut.
    if ROUND_BY_HAND:
        bits = y.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(y == y, rounded.to(tl.float32, bitcast=True), y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _group_norm_silu_kernel(
    out, x,  # (R, C, P), strides below
    weight, bias,  # (M, C) contiguous, or None
    model_index,  # (R,) int64, or None: every row takes model 0
    addend, scale, shift,  # (R, C), channels next to each other, or None
    eps,
    positions, groups,
    out_row, out_channel, out_position, x_row, x_channel, x_position,
    addend_row, scale_row, shift_row,
    WIDTH: tl.constexpr,  # channels of a group
    SILU: tl.constexpr, ROUND_BY_HAND: tl.constexpr,
    LANES: tl.constexpr, GROUPS: tl.constexpr, POSITIONS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    first_group, _, row = _place(groups, 1, GROUPS)
    channel, is_channel = _channels(first_group, groups, WIDTH, LANES, GROUPS)
    position = tl.arange(0, POSITIONS)
    inside = _mask(position < positions, is_channel, FULL)
    at = position.to(tl.int64)[:, None] * x_position + channel.to(tl.int64)[None, :] * x_channel
    tile = _load(x + row * x_row + at, inside)
    if addend is not None:
        added = _vector(addend, row * addend_row, channel, is_channel)
        tile = _masked(tile + added[None, :], inside)
    count = tl.to_tensor(positions).to(tl.float32) * WIDTH
    tile, _, rest, squares = _statistics(tile, inside, count, GROUPS)
    deviation = tl.div_rn(1.0, tl.sqrt_rn(squares / count + eps))
    factor, summand, after, last = _affine(
        _to_lanes(rest, LANES), _to_lanes(deviation, LANES), weight, bias, model_index, scale, shift,
        row, groups * WIDTH, scale_row, shift_row, channel, is_channel,
    )  # fmt: skip
    at = position.to(tl.int64)[:, None] * out_position + channel.to(tl.int64)[None, :] * out_channel
    _finish(out + row * out_row, at, inside, tile, factor, summand, after, last, SILU, ROUND_BY_HAND)


@triton.jit
def _statistics_kernel(
    means, squares,  # (R, G, chunks) float64
    x,  # (R, C, P), strides below
    addend,  # (R, C), channels next to each other, or None
    positions, groups, chunks, tiles,
    x_row, x_channel, x_position, addend_row,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr, GROUPS: tl.constexpr, POSITIONS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The mean of h and the sum of squared deviations from it, of each group over a chunk of `tiles` tiles."""
    first_group, chunk, row = _place(groups, chunks, GROUPS)
    channel, is_channel = _channels(first_group, groups, WIDTH, LANES, GROUPS)
    if addend is not None:
        added = _vector(addend, row * addend_row, channel, is_channel)
    first = chunk * tiles * POSITIONS
    end = tl.minimum(first + tiles * POSITIONS, positions)
    before = end - end  # positions that the mean is of
    mean, total = tl.zeros((GROUPS,), tl.float64), tl.zeros((GROUPS,), tl.float64)
    for start in range(first, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        inside = _mask(position < end, is_channel, FULL)
        at = position[:, None] * x_position + channel.to(tl.int64)[None, :] * x_channel
        tile = _load(x + row * x_row + at, inside)
        count = tl.minimum(end - start, POSITIONS)
        if addend is not None:
            tile = _masked(tile + added[None, :], inside)
        _, rounded, rest, more = _statistics(tile, inside, count.to(tl.float32) * WIDTH, GROUPS)
        share = count.to(tl.float64) / (before + count).to(tl.float64)
        step = (rounded.to(tl.float64) - mean) + rest.to(tl.float64)
        mean += step * share
        total += more.to(tl.float64) + step * step * (share * before.to(tl.float64) * WIDTH)
        before += count
    group = first_group + tl.arange(0, GROUPS)
    cell = (row * groups + group) * chunks + chunk
    tl.store(means + cell, mean, mask=group < groups)
    tl.store(squares + cell, total, mask=group < groups)


@triton.jit
def _merged(means, squares, first_cell, is_group, positions, chunks, chunk_positions, WIDTH: tl.constexpr,
            CHUNKS: tl.constexpr):  # fmt: skip
    """The means of groups over all chunks, and the variances (G,) float64."""
    chunk = tl.arange(0, CHUNKS)
    inside = is_group[:, None] & (chunk < chunks)[None, :]
    at = first_cell[:, None] + chunk[None, :]
    mean = tl.load(means + at, mask=inside, other=0.0)
    count = tl.minimum(positions - chunk.to(tl.int64) * chunk_positions, chunk_positions)
    all_positions = tl.to_tensor(positions).to(tl.float64)
    share = tl.maximum(count, 0).to(tl.float64)[None, :] / all_positions
    # About the first chunk's: what is averaged is small.
    first = tl.load(means + first_cell, mask=is_group, other=0.0)
    apart = tl.where(inside, mean - first[:, None], 0.0)
    step = tl.sum(apart * share, axis=1)
    apart -= step[:, None]
    within = tl.load(squares + at, mask=inside, other=0.0) / (all_positions * WIDTH)
    return first + step, tl.sum(within + tl.where(inside, apart * apart * share, 0.0), axis=1)


@triton.jit
def _normalize_kernel(
    out, x,  # (R, C, P), strides below
    means, squares,  # (R, G, chunks) float64
    weight, bias,  # (M, C) contiguous, or None
    model_index,  # (R,) int64, or None: every row takes model 0
    addend, scale, shift,  # (R, C), channels next to each other, or None
    eps,
    positions, groups, chunks, tiles,
    out_row, out_channel, out_position, x_row, x_channel, x_position,
    addend_row, scale_row, shift_row,
    WIDTH: tl.constexpr,  # channels of a group
    SILU: tl.constexpr, ROUND_BY_HAND: tl.constexpr,
    LANES: tl.constexpr, GROUPS: tl.constexpr, POSITIONS: tl.constexpr, FULL: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    first_group, chunk, row = _place(groups, chunks, GROUPS)
    channel, is_channel = _channels(first_group, groups, WIDTH, LANES, GROUPS)
    group = first_group + tl.arange(0, GROUPS)
    mean, variance = _merged(
        means, squares, (row * groups + group) * chunks, group < groups, positions, chunks, tiles * POSITIONS, WIDTH,
        CHUNKS,
    )  # fmt: skip
    deviation = tl.div_rn(1.0, tl.sqrt_rn(variance.to(tl.float32) + eps))
    factor, summand, after, last = _affine(
        tl.zeros((GROUPS * LANES,), tl.float32), _to_lanes(deviation, LANES), weight, bias, model_index, scale, shift,
        row, groups * WIDTH, scale_row, shift_row, channel, is_channel,
    )  # fmt: skip
    center = -_to_lanes(mean, LANES)
    if addend is not None:
        center += _vector(addend, row * addend_row, channel, is_channel).to(tl.float64)
    high = center.to(tl.float32)
    low = (center - high.to(tl.float64)).to(tl.float32)
    first = chunk * tiles * POSITIONS
    end = tl.minimum(first + tiles * POSITIONS, positions)
    for start in range(first, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        inside = _mask(position < end, is_channel, FULL)
        at = position[:, None] * x_position + channel.to(tl.int64)[None, :] * x_channel
        tile = _load(x + row * x_row + at, inside)
        tile = (tile + high[None, :]) + low[None, :]
        at = position[:, None] * out_position + channel.to(tl.int64)[None, :] * out_channel
        _finish(out + row * out_row, at, inside, tile, factor, summand, after, last, SILU, ROUND_BY_HAND)


Strides = tuple[int, int, int]  # of rows, channels and positions


def group_norm_silu(
    out: Tensor,
    out_strides: Strides,
    x: Tensor,
    x_strides: Strides,
    groups: int,
    vectors: tuple[Tensor | None, ...],
    *,
    eps: float,
    silu: bool,
    config: Config | None = None,
) -> None:
    """Launch on validated arguments; nothing is checked.

    vectors: weight, bias and model_index, contiguous; addend, scale and shift, channels next to each other
    """
    if x.numel() == 0:
        return
    (rows, channels), positions = x.shape[:2], x.shape[2:].numel()
    config = config or configuration(positions, channels, groups, x.element_size())
    sizes = {"WIDTH": channels // groups, "LANES": triton.next_power_of_2(channels // groups)}
    full = is_full(config, positions, channels, groups)
    sizes |= {"GROUPS": config.groups, "POSITIONS": config.positions, "FULL": full}
    sizes |= launch_options(config, x.element_size())
    last = {"SILU": silu, "ROUND_BY_HAND": INTERPRETED and x.dtype == torch.bfloat16}
    row_strides = tuple(0 if vector is None else vector.stride(0) for vector in vectors[3:])
    programs = rows * triton.cdiv(groups, config.groups)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        if config.tiles == 0:
            whole: Any = _group_norm_silu_kernel
            whole[(programs,)](
                out, x, *vectors, eps, positions, groups, *out_strides, *x_strides, *row_strides, **sizes, **last
            )
            return
        chunks = triton.cdiv(positions, config.tiles * config.positions)
        means, squares = torch.empty((2, rows, groups, chunks), dtype=torch.float64, device=x.device)
        partial: Any = _statistics_kernel
        partial[(programs * chunks,)](
            means, squares, x, vectors[3], positions, groups, chunks, config.tiles, *x_strides, row_strides[0], **sizes
        )
        rest: Any = _normalize_kernel
        rest[(programs * chunks,)](
            out, x, means, squares, *vectors, eps, positions, groups, chunks, config.tiles,
            *out_strides, *x_strides, *row_strides, CHUNKS=triton.next_power_of_2(chunks), **sizes, **last,
        )  # fmt: skip
