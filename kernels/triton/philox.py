"""Device functions of the noise contract (NOISE.md), and of where an element lies.

The arithmetic is that of csrc/cpu/philox.h, operation by operation, and must be compiled without fused multiply-add:
libdevice's logarithm and sine would do too, but exist neither in the interpreter nor with the same bits elsewhere.
"""

import triton
import triton.language as tl


@triton.jit
def noise_words(seed, query_id, timestep, sample, block):
    """Four uint32 words for each element block; seed and id are the bits as int64, block is uint32."""
    seed = tl.to_tensor(seed).to(tl.int64)
    zero = block ^ block
    draw = zero + (timestep | (sample << 16)).to(tl.uint32)
    low, high = zero + query_id.to(tl.uint32), zero + (query_id >> 32).to(tl.uint32)
    return tl.random.philox_impl(block, draw, low, high, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), 10)


@triton.jit
def _minus_two_log(u):
    """-2 ln u with a relative error under 4e-7, also next to u = 1: u = m 2^e, m in [sqrt(1/2), sqrt(2))."""
    SQRT_HALF: tl.constexpr = 0x3F3504F3
    shifted = u.to(tl.int32, bitcast=True) + (0x3F800000 - SQRT_HALF)
    exponent = ((shifted >> 23) - 127).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    low = (-0.6666942834854126 * f + 1.0000064373016357) + f2 * (-0.3981386125087738 * f + 0.4994257688522339)
    high = (-0.32359957695007324 * f + 0.34485316276550293) + f2 * 0.20166635513305664
    return exponent * -1.3862943649291992 + f * (f * (low + (f2 * f2) * high) - 2.0)


@triton.jit
def box_muller(word_a, word_b):
    """r cos(2 pi u_b), r sin(2 pi u_b) with r = sqrt(-2 ln u_a), from the words of both uniforms."""
    u = ((word_a >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    r = tl.sqrt_rn(_minus_two_log(u))
    # u_b in units of 2^-32 turns plus an eighth: bits 31 and 30 are the nearest quadrant, the rest is the angle in
    # quarter turns from there, in [-1/2, 1/2), without rounding.
    turns = (word_b & 0xFFFFFE00) + 0x20000100
    y = ((turns << 2) ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    z = y * y
    z2 = z * z
    sine = y * ((-0.6459610462188721 * z + 1.570796251296997) + z2 * (-0.004554165527224541 * z + 0.07965986430644989))
    cosine = (-1.2336980104446411 * z + 1.0) + z2 * (-0.02042795903980732 * z + 0.25360700488090515)
    r_sine, r_cosine = r * sine, r * cosine
    odd = (turns & 0x40000000) != 0
    along_cos, along_sin = tl.where(odd, r_sine, r_cosine), tl.where(odd, r_cosine, r_sine)
    negative_cos, negative_sin = ((turns + 0x40000000) & 0x80000000) != 0, (turns & 0x80000000) != 0
    return tl.where(negative_cos, -along_cos, along_cos), tl.where(negative_sin, -along_sin, along_sin)


@triton.jit
def standard_normals(seed, query_id, timestep, sample, first_block, ANTITHETIC: tl.constexpr, BLOCKS: tl.constexpr):
    """The normals of 4 BLOCKS elements from element block `first_block` (int64) on, in order (4 BLOCKS,)."""
    counted = sample & -2 if ANTITHETIC else sample
    block = (first_block + tl.arange(0, BLOCKS)).to(tl.uint32)
    w0, w1, w2, w3 = noise_words(seed, query_id, timestep, counted, block)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def offsets(element, size1, size2, size3, stride0, stride1, stride2, stride3, CONTIGUOUS: tl.constexpr):
    """Where logical elements (int64) lie, in elements from the sample's first, as int64."""
    if CONTIGUOUS:
        where = element
    else:
        i3 = element % size3
        rest = element // size3
        i2 = rest % size2
        rest = rest // size2
        where = (rest // size1) * stride0 + (rest % size1) * stride1 + i2 * stride2 + i3 * stride3
    return where


@triton.jit
def noised(x0, x0_scale, eps_scale, eps, sample, where, inside, ANTITHETIC: tl.constexpr):
    """x0_scale x0 + eps_scale eps, two products and a sum; a scale of zero keeps x0, NaN or not, out of it."""
    if ANTITHETIC:
        eps_scale = tl.where((sample & 1) != 0, -eps_scale, eps_scale)
    noise = eps * eps_scale
    # A block, since the interpreter cannot broadcast a scalar condition.
    wanted = (tl.zeros_like(eps) + x0_scale) != 0.0
    signal = tl.load(x0 + where, mask=inside & wanted, other=0.0) * x0_scale
    return tl.where(wanted, signal + noise, noise)
