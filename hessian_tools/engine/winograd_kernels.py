"""The transforms of Winograd's convolution (see `hessian_tools.engine.winograd`), compiled by numba for the CPU.

A transform maps every tile t to M t M' [6, 6]. M is B' for tiles of the inputs [6, 6], A for tiles of the outputs
[4, 4], and G for kernels [3, 3]. The matrices follow from the points 0, 3/4, -3/4, 3/2, -3/2 and infinity. A
transformed tensor is [36, channels, tiles]. Each function processes the channels first..last-1 of it.
"""

# mypy: allow-untyped-defs, disable-error-code="misc"
from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 64  # tiles that are transformed together, so that their entries are vectors
A, B = 9 / 16, 9 / 4  # squares of the points
AB, A_B = A * B, A + B
ROOT_A, ROOT_B = 3 / 4, 3 / 2
G0, GA, GB = 64 / 81, -128 / 243, 32 / 243  # 1 / product of the differences to the other points


def _compiled(function):
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no writable directory for the cache
        return njit(nogil=True, error_model="numpy")(function)


@njit(inline="always", error_model="numpy")
def _map(size, d, r, many):
    """Write M d to r. Row k of d and of r begins at k * many, and d has as many rows as `size` has entries."""
    one = d.dtype.type
    a, b, ab, a_b, root_a, root_b = one(A), one(B), one(AB), one(A_B), one(ROOT_A), one(ROOT_B)
    if len(size) == 6:
        for z in range(many):
            d0, d1, d2 = d[z], d[many + z], d[2 * many + z]
            d3, d4, d5 = d[3 * many + z], d[4 * many + z], d[5 * many + z]
            e, f = d4 - b * d2, root_a * (d3 - b * d1)
            u, v = d4 - a * d2, root_b * (d3 - a * d1)
            r[z] = ab * d0 - a_b * d2 + d4
            r[many + z] = e + f
            r[2 * many + z] = e - f
            r[3 * many + z] = u + v
            r[4 * many + z] = u - v
            r[5 * many + z] = ab * d1 - a_b * d3 + d5
    else:
        for z in range(many):
            d0, d1, d2, d3 = d[z], d[many + z], d[2 * many + z], d[3 * many + z]
            e, f = d0 + a * d2, root_a * (d1 + a * d3)
            u, v = d0 + b * d2, root_b * (d1 + b * d3)
            r[z] = d0
            r[many + z] = e + f
            r[2 * many + z] = e - f
            r[3 * many + z] = u + v
            r[4 * many + z] = u - v
            r[5 * many + z] = d3


@njit(inline="always", error_model="numpy")
def _adjoint(size, d, r, many):
    """Write M' d to r."""
    one = d.dtype.type
    a, b, ab, a_b, root_a, root_b = one(A), one(B), one(AB), one(A_B), one(ROOT_A), one(ROOT_B)
    for z in range(many):
        d0, d1, d2 = d[z], d[many + z], d[2 * many + z]
        d3, d4, d5 = d[3 * many + z], d[4 * many + z], d[5 * many + z]
        e, f, u, v = d1 + d2, root_a * (d1 - d2), d3 + d4, root_b * (d3 - d4)
        if len(size) == 6:
            r[z] = ab * d0
            r[many + z] = ab * d5 - b * f - a * v
            r[2 * many + z] = -a_b * d0 - b * e - a * u
            r[3 * many + z] = f + v - a_b * d5
            r[4 * many + z] = d0 + e + u
            r[5 * many + z] = d5
        else:
            r[z] = d0 + e + u
            r[many + z] = f + v
            r[2 * many + z] = a * e + b * u
            r[3 * many + z] = a * f + b * v + d5


@_compiled
def images(size, x, pad, down, across, first, last, out):
    """Write the transforms of the tiles of x [N, C, H, W] to out [36, C, N * down * across].

    Tiles of 6 x 6 overlap by 2, tiles of 4 x 4 do not. `size` is a tuple of 6 or 4 entries: numba compiles one version
    for each, in which the size is a constant.
    """
    count, _, height, width = x.shape
    rows = len(size)
    many = count * down * across
    plane = np.zeros((max(4 * down - 4 + rows, pad + height), max(4 * across - 4 + rows, pad + width)), x.dtype)
    d, r = np.zeros(rows * rows * BLOCK, x.dtype), np.empty(6 * rows * BLOCK, x.dtype)
    e = np.empty(6 * BLOCK, x.dtype)
    for c in range(first, last):
        p = q = 0
        for n in range(count):
            for i in range(height):
                plane[pad + i, pad : pad + width] = x[n, c, i]
            for i in range(down):
                for j in range(across):
                    for k in range(rows):
                        for m in range(rows):
                            d[(k * rows + m) * BLOCK + q] = plane[4 * i + k, 4 * j + m]
                    q += 1
                    if q == BLOCK or p + q == many:
                        _map(size, d, r, rows * BLOCK)
                        for k in range(6):
                            _map(size, r[k * rows * BLOCK : (k + 1) * rows * BLOCK], e, BLOCK)
                            for m in range(6):
                                out[6 * k + m, c, p : p + q] = e[m * BLOCK : m * BLOCK + q]
                        p, q = p + q, 0


@_compiled
def images_adjoint(size, v, bias, pad, down, across, first, last, out):
    """Write the adjoint of `images` of v, plus the bias if it is not empty, to out [N, C, H, W]."""
    count, _, height, width = out.shape
    rows = len(size)
    many = count * down * across
    plane = np.zeros((max(4 * down - 4 + rows, pad + height), max(4 * across - 4 + rows, pad + width)), v.dtype)
    d, r = np.zeros(36 * BLOCK, v.dtype), np.empty(6 * rows * BLOCK, v.dtype)
    e = np.empty((rows, rows * BLOCK), v.dtype)
    for c in range(first, last):
        shift = bias[c] if len(bias) else v.dtype.type(0)
        p = q = held = 0
        for n in range(count):
            plane[:] = shift
            for i in range(down):
                for j in range(across):
                    if q == held:
                        p, q, held = p + held, 0, min(BLOCK, many - p - held)
                        for k in range(36):
                            d[k * BLOCK : k * BLOCK + held] = v[k, c, p : p + held]
                        _adjoint(size, d, r, 6 * BLOCK)
                        for k in range(rows):
                            _adjoint(size, r[k * 6 * BLOCK : (k + 1) * 6 * BLOCK], e[k], BLOCK)
                    for k in range(rows):
                        for m in range(rows):
                            plane[4 * i + k, 4 * j + m] += e[k, m * BLOCK + q]
                    q += 1
            for i in range(height):
                out[n, c, i] = plane[pad + i, pad : pad + width]


@_compiled
def weights(w, first, last, out):
    """Write the transforms of w [O, C, 9] to out [36, O, C]."""
    one = w.dtype.type
    a, b, g0, ga, gb = one(A), one(B), one(G0), one(GA), one(GB)
    half_a, half_b = one(GA * ROOT_A), one(GB * ROOT_B)
    d, r = np.zeros((3, 3 * BLOCK), w.dtype), np.empty((6, 3 * BLOCK), w.dtype)
    for o in range(first, last):
        for p in range(0, w.shape[1], BLOCK):
            end = min(p + BLOCK, w.shape[1])
            for q in range(end - p):
                for k in range(3):
                    for m in range(3):
                        d[k, m * BLOCK + q] = w[o, p + q, 3 * k + m]
            for z in range(3 * BLOCK):
                d0, d1, d2 = d[0, z], d[1, z], d[2, z]
                e, f, u, v = ga * (d0 + a * d2), half_a * d1, gb * (d0 + b * d2), half_b * d1
                r[0, z] = g0 * d0
                r[1, z] = e + f
                r[2, z] = e - f
                r[3, z] = u + v
                r[4, z] = u - v
                r[5, z] = d2
            for k in range(6):
                row = r[k]
                o0, o1, o2 = out[6 * k, o, p:end], out[6 * k + 1, o, p:end], out[6 * k + 2, o, p:end]
                o3, o4, o5 = out[6 * k + 3, o, p:end], out[6 * k + 4, o, p:end], out[6 * k + 5, o, p:end]
                for z in range(end - p):
                    d0, d1, d2 = row[z], row[BLOCK + z], row[2 * BLOCK + z]
                    e, f, u, v = ga * (d0 + a * d2), half_a * d1, gb * (d0 + b * d2), half_b * d1
                    o0[z] = g0 * d0
                    o1[z] = e + f
                    o2[z] = e - f
                    o3[z] = u + v
                    o4[z] = u - v
                    o5[z] = d2


@_compiled
def weights_adjoint(u, first, last, out):
    """Write the adjoint of `weights` of u [36, O, C] to out [O, C, 9]."""
    one = u.dtype.type
    a, b, g0, ga, gb = one(A), one(B), one(G0), one(GA), one(GB)
    half_a, half_b = one(GA * ROOT_A), one(GB * ROOT_B)
    r, d = np.zeros((6, 3 * BLOCK), u.dtype), np.empty((3, 3 * BLOCK), u.dtype)
    for o in range(first, last):
        for p in range(0, u.shape[2], BLOCK):
            end = min(p + BLOCK, u.shape[2])
            for k in range(6):
                row = r[k]
                u0, u1, u2 = u[6 * k, o, p:end], u[6 * k + 1, o, p:end], u[6 * k + 2, o, p:end]
                u3, u4, u5 = u[6 * k + 3, o, p:end], u[6 * k + 4, o, p:end], u[6 * k + 5, o, p:end]
                for z in range(end - p):
                    e, f = ga * (u1[z] + u2[z]), gb * (u3[z] + u4[z])
                    row[z] = g0 * u0[z] + e + f
                    row[BLOCK + z] = half_a * (u1[z] - u2[z]) + half_b * (u3[z] - u4[z])
                    row[2 * BLOCK + z] = a * e + b * f + u5[z]
            for z in range(3 * BLOCK):
                e, f = ga * (r[1, z] + r[2, z]), gb * (r[3, z] + r[4, z])
                d[0, z] = g0 * r[0, z] + e + f
                d[1, z] = half_a * (r[1, z] - r[2, z]) + half_b * (r[3, z] - r[4, z])
                d[2, z] = a * e + b * f + r[5, z]
            for q in range(end - p):
                for k in range(3):
                    for m in range(3):
                        out[o, p + q, 3 * k + m] = d[k, m * BLOCK + q]
