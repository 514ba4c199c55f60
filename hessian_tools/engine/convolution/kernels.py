"""The transforms of `hessian_tools.engine.convolution.winograd`, compiled by numba for the CPU.

A transform maps every tile t to M t M' [6, 6]. M is B' for tiles of the inputs [6, 6], A for tiles of the outputs
[4, 4], and G for kernels [3, 3]. The matrices follow from the points 0, 3/4, -3/4, 3/2, -3/2 and infinity. A
transformed tensor is [36, channels, tiles]. Each function processes the channels first..last-1 of it.
"""

# mypy: allow-untyped-defs, disable-error-code="misc"
from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 64  # entries that are transformed together, with strides that the compiler knows
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
def _map(size, d, step, r, stride, many):
    """Write M d to r. Row k of d begins at k * step, that of r at k * stride, and has `many` entries."""
    one = d.dtype.type
    a, b, ab, a_b, root_a, root_b = one(A), one(B), one(AB), one(A_B), one(ROOT_A), one(ROOT_B)
    if len(size) == 6:
        for z in range(many):
            d0, d1, d2 = d[z], d[step + z], d[2 * step + z]
            d3, d4, d5 = d[3 * step + z], d[4 * step + z], d[5 * step + z]
            e, f = d4 - b * d2, root_a * (d3 - b * d1)
            u, v = d4 - a * d2, root_b * (d3 - a * d1)
            r[z] = ab * d0 - a_b * d2 + d4
            r[stride + z] = e + f
            r[2 * stride + z] = e - f
            r[3 * stride + z] = u + v
            r[4 * stride + z] = u - v
            r[5 * stride + z] = ab * d1 - a_b * d3 + d5
    else:
        for z in range(many):
            d0, d1, d2, d3 = d[z], d[step + z], d[2 * step + z], d[3 * step + z]
            e, f = d0 + a * d2, root_a * (d1 + a * d3)
            u, v = d0 + b * d2, root_b * (d1 + b * d3)
            r[z] = d0
            r[stride + z] = e + f
            r[2 * stride + z] = e - f
            r[3 * stride + z] = u + v
            r[4 * stride + z] = u - v
            r[5 * stride + z] = d3


@njit(inline="always", error_model="numpy")
def _adjoint(size, d, step, r, stride, many):
    """Write M' d to r, with rows as in `_map`."""
    one = d.dtype.type
    a, b, ab, a_b, root_a, root_b = one(A), one(B), one(AB), one(A_B), one(ROOT_A), one(ROOT_B)
    for z in range(many):
        d0, d1, d2 = d[z], d[step + z], d[2 * step + z]
        d3, d4, d5 = d[3 * step + z], d[4 * step + z], d[5 * step + z]
        e, f, u, v = d1 + d2, root_a * (d1 - d2), d3 + d4, root_b * (d3 - d4)
        if len(size) == 6:
            r[z] = ab * d0
            r[stride + z] = ab * d5 - b * f - a * v
            r[2 * stride + z] = -a_b * d0 - b * e - a * u
            r[3 * stride + z] = f + v - a_b * d5
            r[4 * stride + z] = d0 + e + u
            r[5 * stride + z] = d5
        else:
            r[z] = d0 + e + u
            r[stride + z] = f + v
            r[2 * stride + z] = a * e + b * u
            r[3 * stride + z] = a * f + b * v + d5


@njit(inline="always")
def _copy(source, target, many):
    """Copy the first entries. Loops over views are faster than assignments of slices."""
    for z in range(many):
        target[z] = source[z]


@njit(inline="always")
def _add(source, target, many):
    for z in range(many):
        target[z] += source[z]


@_compiled
def group_size(across):
    """Return of how many samples the tiles are in the order (down, sample, across), so that rows of tiles are long."""
    return 1 if across >= 16 else 32 // across


@_compiled
def images(size, x, pad, down, across, first, last, out):
    """Write the transforms of the tiles of x [N, C, H, W] to out [36, C, N * down * across].

    Tiles of 6 x 6 overlap by 2, tiles of 4 x 4 do not. `size` is a tuple of 6 or 4 entries: numba compiles one version
    for each, in which the size is a constant. Tiles are in the order that `group_size` says. Every loop runs
    along memory, over columns for the vertical transform and over tiles for the horizontal one. The two columns by
    which the last tiles of a row overlap the next are held apart (`extra`).
    """
    count, _, height, width = x.shape
    rows, group = len(size), group_size(across)
    tall = 4 * down + rows - 4
    r, s = np.empty(6 * 4 * BLOCK, x.dtype), np.empty(6 * 2 * BLOCK, x.dtype)
    phases, p, e = r.reshape((6 * BLOCK, 4)), np.zeros(rows * BLOCK, x.dtype), np.empty(6 * BLOCK, x.dtype)
    inner = min(width, 4 * across - pad)
    for begin in range(0, count, group):
        held = min(group, count - begin)
        tiles, line, ends = held * across, 4 * held * across, 2 * held
        plane, extra = np.zeros(tall * line, x.dtype), np.zeros(tall * ends, x.dtype)
        for c in range(first, last):
            for n in range(held):
                for i in range(height):
                    source, to = x[begin + n, c, i], (pad + i) * line + n * 4 * across + pad
                    _copy(source, plane[to:], inner)
                    for j in range(inner, width):
                        extra[(pad + i) * ends + 2 * n + pad + j - 4 * across] = source[j]
            for i in range(down):
                _map(size, plane[4 * i * line :], line, r, 4 * BLOCK, line)
                _map(size, extra[4 * i * ends :], ends, s, 2 * BLOCK, ends)
                to = begin * down * across + i * tiles
                for k in range(6):
                    row = phases[k * BLOCK : (k + 1) * BLOCK]
                    for q in range(tiles):
                        p[q] = row[q, 0]
                        p[BLOCK + q] = row[q, 1]
                        p[2 * BLOCK + q] = row[q, 2]
                        p[3 * BLOCK + q] = row[q, 3]
                    if rows == 6:
                        _copy(p[1:], p[4 * BLOCK :], 2 * BLOCK - 1)
                        for n in range(held):
                            for m in range(2):
                                p[(4 + m) * BLOCK + (n + 1) * across - 1] = s[2 * k * BLOCK + 2 * n + m]
                    _map(size, p, BLOCK, e, BLOCK, tiles)
                    for m in range(6):
                        _copy(e[m * BLOCK :], out[6 * k + m, c, to:], tiles)


@_compiled
def images_adjoint(size, v, bias, pad, down, across, first, last, out):
    """Write the adjoint of `images` of v, plus the bias if it is not empty, to out [N, C, H, W]."""
    count, _, height, width = out.shape
    rows, group = len(size), group_size(across)
    tall = 4 * down + rows - 4
    r, s = np.empty(6 * 4 * BLOCK, v.dtype), np.empty(6 * 2 * BLOCK, v.dtype)
    phases, p, d = r.reshape((6 * BLOCK, 4)), np.zeros(rows * BLOCK, v.dtype), np.empty(6 * BLOCK, v.dtype)
    e, f = np.empty(rows * 4 * BLOCK, v.dtype), np.empty(rows * 2 * BLOCK, v.dtype)
    inner = min(width, 4 * across - pad)
    for begin in range(0, count, group):
        held = min(group, count - begin)
        tiles, line, ends = held * across, 4 * held * across, 2 * held
        plane, extra = np.empty(tall * line, v.dtype), np.empty(tall * ends, v.dtype)
        for c in range(first, last):
            plane[:] = extra[:] = bias[c] if len(bias) else v.dtype.type(0)
            for i in range(down):
                at = begin * down * across + i * tiles
                for k in range(6):
                    for m in range(6):
                        _copy(v[6 * k + m, c, at:], d[m * BLOCK :], tiles)
                    _adjoint(size, d, BLOCK, p, BLOCK, tiles)
                    if rows == 6:
                        for n in range(held):
                            for m in range(2):
                                last_tile = (4 + m) * BLOCK + (n + 1) * across - 1
                                s[2 * k * BLOCK + 2 * n + m] = p[last_tile]
                                p[last_tile] = 0
                        _add(p[4 * BLOCK :], p[1:], tiles - 1)
                        _add(p[5 * BLOCK :], p[BLOCK + 1 :], tiles - 1)
                    row = phases[k * BLOCK : (k + 1) * BLOCK]
                    for q in range(tiles):
                        row[q, 0] = p[q]
                        row[q, 1] = p[BLOCK + q]
                        row[q, 2] = p[2 * BLOCK + q]
                        row[q, 3] = p[3 * BLOCK + q]
                _adjoint(size, r, 4 * BLOCK, e, 4 * BLOCK, line)
                _adjoint(size, s, 2 * BLOCK, f, 2 * BLOCK, ends)
                for k in range(rows):
                    _add(e[4 * k * BLOCK :], plane[(4 * i + k) * line :], line)
                    _add(f[2 * k * BLOCK :], extra[(4 * i + k) * ends :], ends)
            for n in range(held):
                for i in range(height):
                    target, at = out[begin + n, c, i], (pad + i) * line + n * 4 * across + pad
                    _copy(plane[at:], target, inner)
                    for j in range(inner, width):
                        target[j] = extra[(pad + i) * ends + 2 * n + pad + j - 4 * across]


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
