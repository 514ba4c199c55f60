"""The scans of `ikun.kernels.dispatch` as numba kernels for the CPU.

`dispatch` compiles these functions. A scan processes the blocks first..last-1 of `block` neurons
each, so that the state of a block stays in the cache over all steps. An empty array stands for an array that is not
used. `slopes` processes the entries first..last-1 of flat arrays.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import numpy as np
from numba import njit

from ikun.kernels.families import BUMP, GAUSS, LAPLACE, LOGISTIC, LORENTZ, RECT, TRIANGLE

CACHED = 4096  # entries that an element-wise pass processes at a time


@njit(error_model="numpy")
def _room(entries, like):
    """Return the arguments y, e, d, powers and words of `_exponentials`."""
    room = np.zeros((4, entries), like.dtype)
    return room[0], room[1], room[2], room[3], room[3].view(np.int32).reshape(entries, like.itemsize // 4)


@njit(error_model="numpy")
def _exponentials(y, many, e, d, powers, words):
    """Write exp(y) to e and exp(y) - 1 to d, for y <= 0.

    y is n log 2 + r with |r| <= log(2) / 2, and exp(r) - 1 a Taylor polynomial. 2^n is made from its bits: powers and
    words, the same memory as 32-bit integers [entries, 1 or 2], are zero at first. Below -87 (-708 in float64), where
    exp(y) nears the smallest number, the result is that of -87 (-708). LLVM vectorizes this, but not calls of exp.
    """
    one = y.dtype.type
    double = one(1e-300) > one(0)
    least, last, bias, shift = (one(-708), 1, 1023, 20) if double else (one(-87), 0, 127, 23)
    for i in range(many):
        x = least if y[i] < least else y[i]
        n = np.floor(x * one(1.4426950408889634) + one(0.5))
        r = (x - n * one(0.693359375)) - n * one(-2.12194440054690583e-4)  # log 2 in two parts
        words[i, last] = np.int32(np.int32(n) + bias) << shift
        s = one(1 / 6227020800)
        for k in (479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1):
            s = s * r + one(1 / k)
        d[i] = s * r
    for i in range(many):
        m = powers[i] * d[i]
        e[i] = powers[i] + m
        d[i] = (powers[i] - one(1)) + m


def value(
    x, z, u, state, decay, gain, offset, threshold, v_reset, hard, after,
    height, width, ties, index, block, first, last, out,
):  # fmt: skip
    """Write the spikes to out, h - threshold to z, and index and u if they are used."""
    # The operations and their order are those of neurons.step, so that the spikes are identical to the last bit.
    # y - y is NaN where y is not finite.
    steps, size = z.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, x.shape[0] == 1
    carried = state.shape[0] > 0
    one, zero = z.dtype.type(1), z.dtype.type(0)
    v, s = np.empty(block, z.dtype), np.empty(block, z.dtype)
    across = width // 2
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        if carried:
            v[:n] = state[0, lo : lo + n]
        else:
            v[:] = v_reset
        for t in range(steps):
            xt, zt = x[0 if static else t, lo : lo + n], z[t, lo : lo + n]
            target = s[:n] if pooled else out[t, lo : lo + n]
            if learned:
                ut = u[t, lo : lo + n]
                for i in range(n):
                    ut[i] = xt[i] - v[i] + v_reset
            for i in range(n):
                h = decay * v[i] + gain * xt[i] + offset
                y = h - threshold
                f = (one if y >= zero else zero) + (y - y)
                v[i] = h * (one - hard * f) + after * f
                zt[i] = y
                target[i] = f
            if pooled:
                j = lo // (height * width) * (height // 2) * across
                for plane in range(0, n, height * width):
                    for row in range(height // 2):
                        corner = plane + 2 * row * width
                        upper, lower = s[corner : corner + width], s[corner + width : corner + 2 * width]
                        ot, it = out[t, j : j + across], index[t, j : j + across]
                        for i in range(across):
                            q = 2 * i
                            best, k = upper[q], 0
                            for w, place in ((upper[q + 1], 1), (lower[q], width), (lower[q + 1], width + 1)):
                                better = w >= best if ties else w > best
                                best, k = (w, place) if better else (best, k)
                            ot[i] = best
                            it[i] = lo + corner + q + k
                        j += across
        if carried:
            state[0, lo : lo + n] = v[:n]


def select(s, height, width, ties, first, last, out, index):
    """Write the entries that max-pooling selects from the planes first..last-1 of every step, and their positions."""
    # s: [T, planes, height * width]; out, index: [T, planes, Q]
    for t in range(s.shape[0]):
        for plane in range(first, last):
            j = 0
            st, ot, it = s[t, plane], out[t, plane], index[t, plane]
            for row in range(height // 2):
                corner = 2 * row * width
                for i in range(width // 2):
                    q = corner + 2 * i
                    best, k = st[q], 0
                    for w, place in ((st[q + 1], 1), (st[q + width], width), (st[q + width + 1], width + 1)):
                        better = w >= best if ties else w > best
                        best, k = (w, place) if better else (best, k)
                    ot[j] = best
                    it[j] = plane * height * width + q + k
                    j += 1


def tangent(x, f1, c, u, state, decay, gain, dgain, index, block, first, last, out):
    """Write the tangent of the spikes to out."""
    real = f1.dtype.type
    steps, size = f1.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, x.shape[0] == 1
    carried = state.shape[0] > 0
    v, s = np.empty(block, f1.dtype), np.empty(block, f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        if carried:
            v[:n] = state[0, lo : lo + n]
        for t in range(steps):
            xt, ft, ct = x[0 if static else t, lo : lo + n], f1[t, lo : lo + n], c[t, lo : lo + n]
            target = s[:n] if pooled else out[t, lo : lo + n]
            if learned:
                ut = u[t, lo : lo + n]
                for i in range(n):
                    h = decay * v[i] + gain * xt[i] + dgain * ut[i]
                    v[i] = real(ct[i]) * h
                    target[i] = ft[i] * h
            else:
                for i in range(n):
                    h = decay * v[i] + gain * xt[i]
                    v[i] = real(ct[i]) * h
                    target[i] = ft[i] * h
            if pooled:
                start = b * per
                for j in range(start, min(start + per, index.shape[1])):
                    out[t, j] = s[index[t, j] - lo]
        if carried:
            state[0, lo : lo + n] = v[:n]


def adjoint(g, f1, c, u, z, e, gh, state, decay, gain, ra, rb, q, k, family, index, block, first, last, out):
    """Write the adjoint of the input to out, and e and gh if z is given. Return dL/dgain."""
    real = f1.dtype.type
    steps, size = f1.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, out.shape[0] == 1
    keep, carried = z.shape[0] > 0, state.shape[0] > 0
    one, zero = f1.dtype.type(1), f1.dtype.type(0)
    v, s = np.empty(block, f1.dtype), np.empty(block, f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    exponent, exp, exp1, powers, words = _room(block if keep and family == LOGISTIC else 0, f1)
    total = 0.0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        if carried:
            v[:n] = state[0, lo : lo + n]
        if static:
            out[0, lo : lo + n] = 0
        for t in range(steps - 1, -1, -1):
            ft, ct, ot = f1[t, lo : lo + n], c[t, lo : lo + n], out[0 if static else t, lo : lo + n]
            gt = s[:n] if pooled else g[t, lo : lo + n]
            if pooled:
                s[:] = 0
                start = b * per
                for j in range(start, min(start + per, index.shape[1])):
                    s[index[t, j] - lo] = g[t, j]
            if learned:
                ut = u[t, lo : lo + n]
                for i in range(n):
                    total += (ft[i] * gt[i] + real(ct[i]) * v[i]) * ut[i]
            if keep:
                zt, et = z[t, lo : lo + n], e[t, lo : lo + n]
                if family == LORENTZ:
                    for i in range(n):
                        et[i] = k * zt[i] * (ft[i] * ft[i])
                elif family == GAUSS:
                    for i in range(n):
                        et[i] = k * zt[i] * ft[i]
                elif family == LAPLACE:
                    for i in range(n):
                        et[i] = k * ft[i] * (one if zt[i] > zero else (-one if zt[i] < zero else zero))
                elif family == LOGISTIC:
                    for i in range(n):
                        exponent[i] = -q * abs(zt[i])
                    _exponentials(exponent, n, exp, exp1, powers, words)
                    for i in range(n):
                        side = one if zt[i] > zero else (-one if zt[i] < zero else zero)
                        et[i] = k * ft[i] * side * -exp1[i] / (one + exp[i])
                elif family == BUMP:
                    for i in range(n):
                        et[i] = k * ft[i] * np.sqrt(ft[i]) * (one if zt[i] > zero else (-one if zt[i] < zero else zero))
                elif family == TRIANGLE:
                    for i in range(n):
                        et[i] = k * (
                            (one if zt[i] > zero else (-one if zt[i] < zero else zero)) if ft[i] > zero else zero
                        )
                elif family == RECT:
                    et[:] = 0
                for i in range(n):
                    et[i] = et[i] * (gt[i] + v[i] * (ra + rb * zt[i])) + (rb + rb) * v[i] * ft[i]
                if learned:
                    at = gh[t, lo : lo + n]
                    for i in range(n):
                        at[i] = ft[i] * gt[i] + real(ct[i]) * v[i]
            if static:
                for i in range(n):
                    h = ft[i] * gt[i] + real(ct[i]) * v[i]
                    v[i] = decay * h
                    ot[i] += gain * h
            else:
                for i in range(n):
                    h = ft[i] * gt[i] + real(ct[i]) * v[i]
                    v[i] = decay * h
                    ot[i] = gain * h
        if carried:
            state[0, lo : lo + n] = v[:n]
    return total


def adjoint_tangent(g, x, f1, c, e, u, gh, begin, state, decay, gain, dgain, index, block, first, last, out):
    """Write the tangent of the adjoint of the input to out. Return (dL/dgain)'."""
    real = f1.dtype.type
    steps, size = f1.shape
    pooled, learned = index.shape[0] > 0, u.shape[0] > 0
    static_in, static = x.shape[0] == 1, out.shape[0] == 1
    begun, carried = begin.shape[0] > 0, state.shape[0] > 0
    v, s, hs = np.empty(block, f1.dtype), np.empty(block, f1.dtype), np.empty((steps, block), f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    total = 0.0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        if begun:
            v[:n] = begin[0, lo : lo + n]
        for t in range(steps):
            xt, ct, ht = x[0 if static_in else t, lo : lo + n], c[t, lo : lo + n], hs[t, :n]
            if learned:
                ut, gt = u[t, lo : lo + n], gh[t, lo : lo + n]
                for i in range(n):
                    total += gt[i] * (xt[i] - v[i])
                    h = decay * v[i] + gain * xt[i] + dgain * ut[i]
                    ht[i] = h
                    v[i] = real(ct[i]) * h
            else:
                for i in range(n):
                    h = decay * v[i] + gain * xt[i]
                    ht[i] = h
                    v[i] = real(ct[i]) * h
        v[:] = 0
        if carried:
            v[:n] = state[0, lo : lo + n]
        if static:
            out[0, lo : lo + n] = 0
        for t in range(steps - 1, -1, -1):
            ft, ct, et, ht = f1[t, lo : lo + n], c[t, lo : lo + n], e[t, lo : lo + n], hs[t, :n]
            ot = out[0 if static else t, lo : lo + n]
            gt = s[:n] if pooled else g[t, lo : lo + n]
            if pooled:
                s[:] = 0
                start = b * per
                for j in range(start, min(start + per, index.shape[1])):
                    s[index[t, j] - lo] = g[t, j]
            if learned:
                ut, at = u[t, lo : lo + n], gh[t, lo : lo + n]
                for i in range(n):
                    h = ft[i] * gt[i] + real(ct[i]) * v[i] + et[i] * ht[i]
                    total += h * ut[i]
                    v[i] = decay * h - dgain * at[i]
                    if static:
                        ot[i] += gain * h + dgain * at[i]
                    else:
                        ot[i] = gain * h + dgain * at[i]
            elif static:
                for i in range(n):
                    h = ft[i] * gt[i] + real(ct[i]) * v[i] + et[i] * ht[i]
                    v[i] = decay * h
                    ot[i] += gain * h
            else:
                for i in range(n):
                    h = ft[i] * gt[i] + real(ct[i]) * v[i] + et[i] * ht[i]
                    v[i] = decay * h
                    ot[i] = gain * h
        if carried:
            state[0, lo : lo + n] = v[:n]
    return total


def slopes(z, family, p, q, a, b, soft, detached, first, last, f1, c):
    """Write f' to f1 and dv/dh to c at z = h - threshold."""
    one, zero = z.dtype.type(1), z.dtype.type(0)
    exponent, exp, exp1, powers, words = _room(CACHED, z)
    for lo in range(first, last, CACHED):
        n = min(CACHED, last - lo)
        zt, ft, ct = z[lo : lo + n], f1[lo : lo + n], c[lo : lo + n]
        if family == LORENTZ:
            for i in range(n):
                ft[i] = p / (one + q * zt[i] * zt[i])
        elif family in (LOGISTIC, LAPLACE, GAUSS):
            for i in range(n):
                exponent[i] = -q * (zt[i] * zt[i] if family == GAUSS else abs(zt[i]))
            _exponentials(exponent, n, exp, exp1, powers, words)
            for i in range(n):
                w = one / (one + exp[i]) if family == LOGISTIC else one
                ft[i] = p * exp[i] * w * w
        elif family == BUMP:
            for i in range(n):
                u = one / (one + q * abs(zt[i]))
                ft[i] = p * u * u
        elif family == TRIANGLE:
            for i in range(n):
                y = p - q * abs(zt[i])
                ft[i] = zero if y < zero else y
        elif family == RECT:
            for i in range(n):
                ft[i] = (p if abs(zt[i]) < q else zero) + (zt[i] - zt[i])
        if detached:  # c may be of integers
            for i in range(n):
                ct[i] = 1 if soft or zt[i] < zero else 0
        elif soft:
            for i in range(n):
                ct[i] = one + (a + b * zt[i]) * ft[i]
        else:
            for i in range(n):
                ct[i] = (one if zt[i] < zero else zero) + (a + b * zt[i]) * ft[i]
