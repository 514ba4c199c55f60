"""The transforms of Winograd's convolution (see `hessian_tools.engine.winograd`) as numba kernels for the CPU.

These are plain Python functions that `winograd` compiles. Each processes the channels first..last-1 of its output. A
transformed tensor is [16, channels, samples * tiles], with the tiles of a sample in row-major order. Tiles have 4 x 4
inputs, which overlap by 2, and 2 x 2 outputs.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import numpy as np


def inputs(x, pad, down, across, first, last, out):
    """Write B' d B of every tile d of x [N, C, H, W] to out."""
    count, _, height, width = x.shape
    wide = 2 * across + 2
    plane, r = np.zeros((2 * down + 2, wide), x.dtype), np.empty((4, wide), x.dtype)
    for c in range(first, last):
        for n in range(count):
            for i in range(height):
                plane[pad + i, pad : pad + width] = x[n, c, i]
            for i in range(down):
                d0, d1, d2, d3 = plane[2 * i], plane[2 * i + 1], plane[2 * i + 2], plane[2 * i + 3]
                for j in range(wide):
                    r[0, j] = d0[j] - d2[j]
                    r[1, j] = d1[j] + d2[j]
                    r[2, j] = d2[j] - d1[j]
                    r[3, j] = d1[j] - d3[j]
                p = (n * down + i) * across
                for a in range(4):
                    ra = r[a]
                    o0, o1 = out[4 * a, c, p : p + across], out[4 * a + 1, c, p : p + across]
                    o2, o3 = out[4 * a + 2, c, p : p + across], out[4 * a + 3, c, p : p + across]
                    for j in range(across):
                        e0, e1, e2, e3 = ra[2 * j], ra[2 * j + 1], ra[2 * j + 2], ra[2 * j + 3]
                        o0[j] = e0 - e2
                        o1[j] = e1 + e2
                        o2[j] = e2 - e1
                        o3[j] = e1 - e3


def inputs_adjoint(v, pad, down, across, first, last, out):
    """Write the adjoint of `inputs` of v to out [N, C, H, W]."""
    count, _, height, width = out.shape
    wide = 2 * across + 2
    plane, r = np.empty((2 * down + 2, wide), v.dtype), np.empty((4, wide), v.dtype)
    for c in range(first, last):
        for n in range(count):
            plane[:] = 0
            for i in range(down):
                p = (n * down + i) * across
                for a in range(4):
                    ra = r[a]
                    v0, v1 = v[4 * a, c, p : p + across], v[4 * a + 1, c, p : p + across]
                    v2, v3 = v[4 * a + 2, c, p : p + across], v[4 * a + 3, c, p : p + across]
                    ra[0] = 0
                    ra[1] = 0
                    for j in range(across):
                        ra[2 * j] += v0[j]
                        ra[2 * j + 1] += v1[j] - v2[j] + v3[j]
                        ra[2 * j + 2] = v1[j] + v2[j] - v0[j]
                        ra[2 * j + 3] = -v3[j]
                d0, d1, d2, d3 = plane[2 * i], plane[2 * i + 1], plane[2 * i + 2], plane[2 * i + 3]
                for j in range(wide):
                    d0[j] += r[0, j]
                    d1[j] += r[1, j] - r[2, j] + r[3, j]
                    d2[j] = r[1, j] + r[2, j] - r[0, j]
                    d3[j] = -r[3, j]
            for i in range(height):
                out[n, c, i] = plane[pad + i, pad : pad + width]


def outputs(m, bias, down, across, first, last, out):
    """Write A' m A + bias of every tile to out [N, O, H, W]. The bias may be empty."""
    count, _, height, width = out.shape
    r = np.empty((2, 4, across), m.dtype)
    plane = np.empty((2, 2 * across), m.dtype)
    for o in range(first, last):
        shift = bias[o] if bias.shape[0] > 0 else m.dtype.type(0)
        for n in range(count):
            for i in range(down):
                p = (n * down + i) * across
                for b in range(4):
                    m0, m1 = m[b, o, p : p + across], m[4 + b, o, p : p + across]
                    m2, m3 = m[8 + b, o, p : p + across], m[12 + b, o, p : p + across]
                    for j in range(across):
                        r[0, b, j] = m0[j] + m1[j] + m2[j]
                        r[1, b, j] = m1[j] - m2[j] - m3[j]
                for a in range(2):
                    r0, r1, r2, r3, row = r[a, 0], r[a, 1], r[a, 2], r[a, 3], plane[a]
                    for j in range(across):
                        row[2 * j] = r0[j] + r1[j] + r2[j] + shift
                        row[2 * j + 1] = r1[j] - r2[j] - r3[j] + shift
                out[n, o, 2 * i] = plane[0, :width]
                if 2 * i + 1 < height:
                    out[n, o, 2 * i + 1] = plane[1, :width]


def outputs_adjoint(g, down, across, first, last, out):
    """Write the adjoint of `outputs` of g [N, O, H, W] to out."""
    count, _, height, width = g.shape
    plane = np.zeros((2, 2 * across), g.dtype)
    r = np.empty((4, 2 * across), g.dtype)
    for o in range(first, last):
        for n in range(count):
            for i in range(down):
                plane[0, :width] = g[n, o, 2 * i]
                if 2 * i + 1 < height:
                    plane[1, :width] = g[n, o, 2 * i + 1]
                else:
                    plane[1] = 0
                for j in range(2 * across):
                    r[0, j] = plane[0, j]
                    r[1, j] = plane[0, j] + plane[1, j]
                    r[2, j] = plane[0, j] - plane[1, j]
                    r[3, j] = -plane[1, j]
                p = (n * down + i) * across
                for a in range(4):
                    ra = r[a]
                    o0, o1 = out[4 * a, o, p : p + across], out[4 * a + 1, o, p : p + across]
                    o2, o3 = out[4 * a + 2, o, p : p + across], out[4 * a + 3, o, p : p + across]
                    for j in range(across):
                        e, f = ra[2 * j], ra[2 * j + 1]
                        o0[j] = e
                        o1[j] = e + f
                        o2[j] = e - f
                        o3[j] = -f


def weights(w, first, last, out):
    """Write G w G' of every kernel of w [O, C, 3, 3] to out [16, O, C]."""
    half = w.dtype.type(0.5)
    r = np.empty((4, 3), w.dtype)
    for o in range(first, last):
        for c in range(w.shape[1]):
            for k in range(3):
                a, b, d = w[o, c, 0, k], w[o, c, 1, k], w[o, c, 2, k]
                r[0, k] = a
                r[1, k] = half * (a + b + d)
                r[2, k] = half * (a - b + d)
                r[3, k] = d
            for k in range(4):
                a, b, d = r[k, 0], r[k, 1], r[k, 2]
                out[4 * k, o, c] = a
                out[4 * k + 1, o, c] = half * (a + b + d)
                out[4 * k + 2, o, c] = half * (a - b + d)
                out[4 * k + 3, o, c] = d


def weights_adjoint(u, first, last, out):
    """Write the adjoint of `weights` of u [16, O, C] to out [O, C, 3, 3]."""
    half = u.dtype.type(0.5)
    r = np.empty((3, 4), u.dtype)
    for o in range(first, last):
        for c in range(u.shape[2]):
            for k in range(4):
                a, b, d, e = u[k, o, c], u[4 + k, o, c], u[8 + k, o, c], u[12 + k, o, c]
                r[0, k] = a + half * (b + d)
                r[1, k] = half * (b - d)
                r[2, k] = half * (b + d) + e
            for k in range(3):
                a, b, d, e = r[k, 0], r[k, 1], r[k, 2], r[k, 3]
                out[o, c, k, 0] = a + half * (b + d)
                out[o, c, k, 1] = half * (b - d)
                out[o, c, k, 2] = half * (b + d) + e
