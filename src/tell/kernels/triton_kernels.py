"""The kernels of ``triton_ops`` in Triton: fp32 inside, any number format in memory, 64-bit offsets.

Imported only where they are run. A program is one tile; what a launch needs to know is said where it is launched.
"""

import triton
import triton.language as tl


@triton.jit
def rms_rows(row, rows, stride, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of some heads of (T, HEADS * WIDTH), and which of their elements exist."""
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return (row // HEADS * stride + row % HEADS * WIDTH)[:, None] + column[None, :], inside


@triton.jit(do_not_specialize=["rows"])
def rmsnorm(
    x, y, weight, rstd, x_stride, y_stride, rows, eps, offset,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at, inside = rms_rows(row, rows, x_stride, HEADS, WIDTH, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset
    r = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)
    tl.store(rstd + row, r, mask=row < rows)
    out, _ = rms_rows(row, rows, y_stride, HEADS, WIDTH, BLOCK)
    tl.store(y + out, value * r[:, None] * factor[None, :], mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rmsnorm_back(
    dy, x, weight, rstd, dx, dy_stride, x_stride, dx_stride, rows, offset,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at, inside = rms_rows(row, rows, x_stride, HEADS, WIDTH, BLOCK)
    grads, _ = rms_rows(row, rows, dy_stride, HEADS, WIDTH, BLOCK)
    out, _ = rms_rows(row, rows, dx_stride, HEADS, WIDTH, BLOCK)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    unit = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * r
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + grads, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    dot = tl.sum(g * unit, axis=1)[:, None] / WIDTH
    tl.store(dx + out, r * (g - unit * dot), mask=inside)


@triton.jit
def activation(g, KIND: tl.constexpr):
    """act(g) and its slope; kind 0 SiLU, 1 GELU by tanh."""
    if KIND == 0:
        s = 1.0 / (1.0 + tl.exp(-g))
        act = g * s
        slope = s * (1.0 + g * (1.0 - s))
    else:
        t = 2.0 / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g))) - 1.0
        act = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.3989422804014327 * g * (1.0 - t * t) * (1.0 + 0.134145 * g * g)
    return act, slope


@triton.jit
def gated(g, u, h, stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(g + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    act, _ = activation(gate, KIND)
    tl.store(h + row * width + column, act * up, mask=inside)


@triton.jit
def gated_back(dh, g, u, dg, du, stride, out_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(g + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * width + column, mask=inside, other=0.0).to(tl.float32)
    act, slope = activation(gate, KIND)
    tl.store(dg + row * out_stride + column, d * up * slope, mask=inside)
    tl.store(du + row * out_stride + column, d * act, mask=inside)
    tl.store(dh + row * width + column, act * up, mask=inside)


@triton.jit
def partners(ROT: tl.constexpr, BLOCK: tl.constexpr):
    """Column each column is rotated with, itself where it is not, and the sign of the rotation."""
    column = tl.arange(0, BLOCK)
    first = column < ROT // 2
    other = tl.where(first, column + ROT // 2, tl.where(column < ROT, column - ROT // 2, column))
    return other, tl.where(first, -1.0, 1.0)


@triton.jit
def head_factor(query_norm, key_norm, is_query, column, offset, WIDTH: tl.constexpr):
    """(heads, columns) what each norm multiplies by."""
    inside = column < WIDTH
    q = tl.load(query_norm + column, mask=inside, other=0.0).to(tl.float32) + offset
    k = tl.load(key_norm + column, mask=inside, other=0.0).to(tl.float32) + offset
    return tl.where(is_query[:, None], q[None, :], k[None, :])


@triton.jit
def heads(
    whole, out, query_norm, key_norm, rstd, cosine, sine, whole_stride, out_stride, query_eps, key_eps, offset,
    Q: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROT: tl.constexpr,
    NORMED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < COUNT)[:, None] & (column < WIDTH)[None, :]
    start = (head * WIDTH)[:, None]
    x = whole + token * whole_stride
    value = tl.load(x + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        is_query = head < Q
        r = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + tl.where(is_query, query_eps, key_eps))
        tl.store(rstd + token * COUNT + head, r, mask=head < COUNT)
        value *= r[:, None] * head_factor(query_norm, key_norm, is_query, column, offset, WIDTH)
    if ROT > 0:
        other, sign = partners(ROT, BLOCK)
        turned = tl.load(x + start + other[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            turned *= r[:, None] * head_factor(query_norm, key_norm, is_query, other, offset, WIDTH)
        c = tl.load(cosine + token * ROT + column, mask=column < ROT, other=1.0).to(tl.float32)
        s = tl.load(sine + token * ROT + column, mask=column < ROT, other=0.0).to(tl.float32)
        rotated = value * c[None, :] + turned * (sign * s)[None, :]
        value = tl.where((head < Q + K)[:, None], rotated, value)
    tl.store(out + token * out_stride + start + column[None, :], value, mask=inside)


@triton.jit
def head_gradients(
    gq, gk, gv, q_stride, k_stride, v_stride, token, head, column,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(heads, columns) from three tensors: each element is loaded from one, the other two loads are masked out."""
    real = (column < WIDTH)[None, :]
    at = (head * WIDTH)[:, None] + column[None, :]
    is_query, is_key = (head < Q)[:, None], ((head >= Q) & (head < Q + K))[:, None]
    is_value = ((head >= Q + K) & (head < Q + K + V))[:, None]
    q = tl.load(gq + token * q_stride + at, mask=is_query & real, other=0.0).to(tl.float32)
    k = tl.load(gk + token * k_stride + at - Q * WIDTH, mask=is_key & real, other=0.0).to(tl.float32)
    v = tl.load(gv + token * v_stride + at - (Q + K) * WIDTH, mask=is_value & real, other=0.0).to(tl.float32)
    return q + k + v


@triton.jit
def heads_back(
    gq, gk, gv, grad, whole, query_norm, key_norm, rstd, cosine, sine,
    q_stride, k_stride, v_stride, grad_stride, whole_stride, offset,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, ROT: tl.constexpr,
    NORMED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < Q + K + V)[:, None] & (column < WIDTH)[None, :]
    at = (head * WIDTH)[:, None] + column[None, :]
    own = head_gradients(gq, gk, gv, q_stride, k_stride, v_stride, token, head, column, Q, K, V, WIDTH)
    g = own
    if ROT > 0:
        other, sign = partners(ROT, BLOCK)
        turned = head_gradients(gq, gk, gv, q_stride, k_stride, v_stride, token, head, other, Q, K, V, WIDTH)
        c = tl.load(cosine + token * ROT + column, mask=column < ROT, other=1.0).to(tl.float32)
        s = tl.load(sine + token * ROT + other, mask=other < ROT, other=0.0).to(tl.float32)
        g = own * c[None, :] - turned * (sign * s)[None, :]
    if NORMED:
        is_normed = head < Q + K
        r = tl.load(rstd + token * (Q + K) + head, mask=is_normed, other=0.0)[:, None]
        unit = tl.load(whole + token * whole_stride + at, mask=inside & is_normed[:, None], other=0.0)
        unit = unit.to(tl.float32) * r
        g *= head_factor(query_norm, key_norm, head < Q, column, offset, WIDTH)
        g = r * (g - unit * (tl.sum(g * unit, axis=1)[:, None] / WIDTH))
    g = tl.where((head < Q + K)[:, None], g, own)
    tl.store(grad + token * grad_stride + at, g, mask=inside)


@triton.jit
def capped(x, softcap, CAPPED: tl.constexpr):
    """softcap tanh(x / softcap)."""
    if CAPPED:
        x = softcap * (2.0 / (1.0 + tl.exp(-2.0 * (x / softcap))) - 1.0)
    return x


@triton.jit(do_not_specialize_on_alignment=["targets", "weights", "nll"])  # blocks begin anywhere in them
def cross_entropy(
    logits, targets, weights, nll, stride, vocabulary, softcap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line, target = logits + row * stride, tl.load(targets + row)
    top, total, picked = float("-inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = capped(tl.load(line + column, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
        largest = tl.maximum(top, tl.max(tl.where(inside, x, float("-inf")), axis=0))
        total = total * tl.exp(top - largest) + tl.sum(tl.where(inside, tl.exp(x - largest), 0.0), axis=0)
        picked += tl.sum(tl.where(column == target, x, 0.0), axis=0)
        top = largest
    tl.store(nll + row, tl.log(total) + top - picked)
    if GRADIENT:
        weight = tl.load(weights + row)
        share = weight / total
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocabulary
            x = capped(tl.load(line + column, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
            g = tl.exp(x - top) * share - tl.where(column == target, weight, 0.0)
            if CAPPED:
                g *= 1.0 - (x / softcap) * (x / softcap)
            tl.store(line + column, g, mask=inside)


@triton.jit
def mix(x):
    """A bijective mix of 32 bits (lowbias32, Wellons 2018), as in the C kernels."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit(do_not_specialize=["seed", "threshold"])
def dropout(x, y, shift, count, seed, threshold, scale, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    first = seed.to(tl.uint32) + tl.load(shift).to(tl.uint32)
    kept = mix(mix(at.to(tl.uint32)) + first) >= threshold.to(tl.uint32)
    value = tl.where(kept, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale, 0.0)
    if ADD:
        value += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value, mask=inside)
