"""NumPy oracle: the exact Hessian of a small spiking network under the surrogate 2-jet rule, by hyper-dual numbers.

A quantity carries its value `a`, its tangents `e1` and `e2` along two families of weight directions, and the mixed
second derivative `e12`. All parts have two leading axes [B1, B2] before the data axes: `a` is [1, 1, ...], `e1`
[B1, 1, ...], `e2` [1, B2, ...], `e12` [B1, B2, ...]. Broadcasting therefore evaluates every pair of directions at once,
and a part known to vanish stays a [1, 1, ...] array of zeros. A spike has value step(x), derivatives f'(x) and f''(x).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Function = Callable[[Array], Array]
Labels = NDArray[np.int64]
BLOCK = 32  # unit vectors a side evaluated at once; memory grows with its square
Params = dict[str, Array]
Layer = dict[str, Any]


# ---------------------------------------------------------------- hyper-dual arithmetic
def _vanishes(part: Array) -> bool:
    """True for the [1, 1, ...] zero arrays that stand for 'no derivative here'."""
    return part.shape[:2] == (1, 1) and not part.any()


def _product(op: Callable[[Array, Array], Array], p: Dual, q: Dual) -> Dual:
    """The product rule for any bilinear `op` (element-wise product, convolution, matrix product)."""
    value = op(p.a, q.a)

    def total(*pairs: tuple[Array, Array]) -> Array:
        terms = [op(left, right) for left, right in pairs if not (_vanishes(left) or _vanishes(right))]
        return sum(terms[1:], start=terms[0]) if terms else np.zeros_like(value)

    return Dual(
        value,
        total((p.e1, q.a), (p.a, q.e1)),
        total((p.e2, q.a), (p.a, q.e2)),
        total((p.e12, q.a), (p.e1, q.e2), (p.e2, q.e1), (p.a, q.e12)),
    )


@dataclass(frozen=True)
class Dual:
    """A hyper-dual array; see the module docstring for the meaning and the shape of the four parts."""

    a: Array
    e1: Array
    e2: Array
    e12: Array

    @staticmethod
    def constant(value: Array) -> Dual:
        """`value` (with its two leading axes) and no derivatives."""
        zero = np.zeros_like(value)
        return Dual(value, zero, zero, zero)

    def map(self, op: Function) -> Dual:
        """Apply an operation that is linear over the data axes to every part."""
        return Dual(op(self.a), op(self.e1), op(self.e2), op(self.e12))

    def lift(self, value: Array, d1: Array, d2: Array) -> Dual:
        """An element-wise function of self, given its value and first two derivatives at self.a."""
        return Dual(value, d1 * self.e1, d1 * self.e2, d1 * self.e12 + d2 * self.e1 * self.e2)

    def __add__(self, other: Dual | Array | float) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.a + other.a, self.e1 + other.e1, self.e2 + other.e2, self.e12 + other.e12)
        return Dual(self.a + other, self.e1, self.e2, self.e12)

    def __mul__(self, other: Dual | Array | float) -> Dual:
        if isinstance(other, Dual):
            return _product(np.multiply, self, other)
        return self.map(lambda part: part * other)

    def __truediv__(self, other: Dual | Array | float) -> Dual:
        if isinstance(other, Dual):
            return self * other.lift(1 / other.a, -1 / other.a**2, 2 / other.a**3)
        return self.map(lambda part: part / other)

    def __neg__(self) -> Dual:
        return self.map(np.negative)

    def __sub__(self, other: Dual | Array | float) -> Dual:
        return self + (-other)

    def exp(self) -> Dual:
        value = np.exp(self.a)
        return self.lift(value, value, value)

    def log(self) -> Dual:
        return self.lift(np.log(self.a), 1 / self.a, -1 / self.a**2)


# ---------------------------------------------------------------- surrogates
def _table(name: str, k: float) -> tuple[Function, Function, Function | None]:
    """(f', f'', F or None); F' = f' rises from 0 to 1 and is given for the smooth surrogates of area 1."""
    c, pi, root = math.pi * k / 2, math.pi, math.sqrt(math.pi)
    erf: Function = np.vectorize(math.erf, otypes=[np.float64])
    if name == "gaussian":  # N(x; 0, k^2) is erf's f' with this slope
        return _table("erf", 1 / (k * math.sqrt(2)))
    table: dict[str, tuple[Function, Function, Function | None]] = {
        "atan": (
            lambda x: k / 2 / (1 + (c * x) ** 2),
            lambda x: -k * c**2 * x / (1 + (c * x) ** 2) ** 2,
            lambda x: np.arctan(c * x) / pi + 0.5,
        ),
        "sigmoid": (  # with t = tanh(k x / 2): s(1 - s) = (1 - t^2) / 4 and 1 - 2s = -t
            lambda x: k / 4 * (1 - np.tanh(k * x / 2) ** 2),
            lambda x: -(k**2) / 4 * (1 - np.tanh(k * x / 2) ** 2) * np.tanh(k * x / 2),
            lambda x: (1 + np.tanh(k * x / 2)) / 2,
        ),
        "erf": (
            lambda x: k / root * np.exp(-((k * x) ** 2)),
            lambda x: -2 * k**3 / root * x * np.exp(-((k * x) ** 2)),
            lambda x: (1 + erf(k * x)) / 2,
        ),
        "fast_sigmoid": (
            lambda x: (1 + k * np.abs(x)) ** -2,
            lambda x: -2 * k * np.sign(x) * (1 + k * np.abs(x)) ** -3,
            None,
        ),
        "triangle": (
            lambda x: np.maximum(1 - np.abs(x) / k, 0) / k,
            lambda x: np.where(np.abs(x) < k, -np.sign(x) / k**2, 0.0),
            None,
        ),
    }
    if name not in table:
        raise ValueError(f"unknown surrogate {name!r}")
    return table[name]


def surrogate(name: str, k: float) -> tuple[Function, Function]:
    """(f', f'') of atan(a), sigmoid(a), erf(a), fast_sigmoid(k), triangle(w) or gaussian(standard deviation)."""
    return _table(name, k)[:2]


def primitive(name: str, k: float) -> Function:
    """F of atan, sigmoid, erf or gaussian, for the "primitive" entry of a relaxed neuron."""
    function = _table(name, k)[2]
    if function is None:
        raise ValueError(f"surrogate {name!r} has no smooth primitive here")
    return function


# ---------------------------------------------------------------- layers, over [B1, B2, T, N, ...]
def _conv(x: Array, w: Array) -> Array:
    """3x3 cross-correlation, stride 1, padding 1: x [.., T, N, C, H, W] and w [.., O, C, 3, 3]."""
    height, width = x.shape[-2:]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)])
    taps = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
    columns = np.stack(taps, axis=-3).reshape(*x.shape[:4], -1, height * width)  # rows in the order (C, 3, 3)
    out = w.reshape(*w.shape[:2], 1, 1, w.shape[2], -1) @ columns
    return out.reshape(*out.shape[:-1], height, width)


def _linear(x: Array, w: Array) -> Array:
    """x [.., T, N, in] and w [.., out, in]."""
    return x @ w.swapaxes(-1, -2)[:, :, None]


def _norm(x: Dual, layer: Layer, weights: dict[str, Dual]) -> Dual:
    """Batch norm in eval mode over the channel axis (the first one after N)."""
    tail = (1,) * (x.a.ndim - 5)
    mean, var = (np.asarray(layer[key], np.float64).reshape(-1, *tail) for key in ("mean", "var"))
    scale, bias = (
        weights[layer[key]].map(lambda part: part.reshape(*part.shape[:2], 1, 1, -1, *tail))
        for key in ("weight", "bias")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def _neuron(x: Dual, layer: Layer, weights: dict[str, Dual]) -> Dual:
    """Integrate, fire and reset along the time axis; returns the spikes."""
    theta, v_reset, hard = float(layer["threshold"]), float(layer["v_reset"]), layer["reset"] == "hard"
    if layer["reset"] not in ("hard", "soft"):
        raise ValueError(f"unknown reset {layer['reset']!r}")
    one = np.ones((1,) * (x.a.ndim - 1))
    if "logit" in layer:  # PLIF: gain = sigmoid(logit), decay = 1 - gain
        logit = weights[layer["logit"]].map(lambda part: part.reshape(*part.shape[:2], *one.shape[2:]))
        gain = Dual.constant(one) / ((-logit).exp() + 1.0)
        decay = -gain + 1.0
    else:
        gain, decay = Dual.constant(one * layer["gain"]), Dual.constant(one * layer["decay"])
    recurrent = weights[layer["recurrent"]] if "recurrent" in layer else None
    f1, f2 = layer["spike"]
    value: Function = layer.get("primitive", lambda z: (z >= 0).astype(np.float64))
    v = Dual.constant(np.full_like(x.a[:, :, 0], v_reset))
    spikes: list[Dual] = []
    for t in range(x.a.shape[2]):
        current = x.map(lambda part, t=t: part[:, :, t])  # type: ignore[misc]
        if recurrent is not None and spikes:  # V s[t-1]; _linear wants an axis of time
            before = spikes[-1].map(lambda part: part[:, :, None])
            current = current + _product(_linear, before, recurrent).map(lambda part: part[:, :, 0])
        h = decay * v + gain * current + (-decay + 1.0) * v_reset
        z = h.a - theta
        s = h.lift(value(z), f1(z), f2(z))
        spikes.append(s)
        r = Dual.constant(s.a) if layer["detach_reset"] else s  # the spike as the reset sees it
        v = h * (-r + 1.0) + r * v_reset if hard else h - r * theta
    steps = zip(*((s.a, s.e1, s.e2, s.e12) for s in spikes), strict=True)
    return Dual(*(np.stack(np.broadcast_arrays(*parts), axis=2) for parts in steps))


def _pool(x: Dual, layer: Layer) -> Dual:
    """2x2 max pooling, stride 2: the position is chosen from the plain values, ties by the layer's rule."""
    if layer["ties"] not in ("first", "last"):
        raise ValueError(f"unknown tie rule {layer['ties']!r}")
    height, width = x.a.shape[-2] // 2 * 2, x.a.shape[-1] // 2 * 2
    windows = x.map(lambda p: np.stack([p[..., i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)], axis=-1))
    index = windows.a.argmax(-1) if layer["ties"] == "first" else 3 - windows.a[..., ::-1].argmax(-1)
    return windows.map(lambda p: np.take_along_axis(p, index[..., None], -1)[..., 0])


def _forward(layers: list[Layer], weights: dict[str, Dual], x: Dual) -> Dual:
    for layer in layers:
        kind = layer["kind"]
        if kind in ("conv", "linear"):
            x = _product(_conv if kind == "conv" else _linear, x, weights[layer["weight"]])
        elif kind in ("norm", "neuron"):
            x = (_norm if kind == "norm" else _neuron)(x, layer, weights)
        elif kind == "pool":
            x = _pool(x, layer)
        elif kind == "residual":
            x = x + _forward(layer["layers"], weights, x)
        elif kind == "flatten":
            x = x.map(lambda part: part.reshape(*part.shape[:4], -1))
        else:
            raise ValueError(f"unknown layer kind {kind!r}")
    return x


def _loss(out: Dual, y: Labels, loss: str) -> Dual:
    """out [B1, B2, N, classes] -> [B1, B2]."""
    onehot = np.eye(out.a.shape[-1])[y]
    if loss == "mse":
        error = out - onehot
        return (error * error).map(lambda part: part.mean((-2, -1)))
    if loss == "ce":
        top = out.a.max(-1, keepdims=True)  # a constant shift; it cancels
        total: Dual = (out - top).exp().map(lambda part: part.sum(-1)).log() + top[..., 0]
        return (total - (out * onehot).map(lambda part: part.sum(-1))).map(lambda part: part.mean(-1))
    raise ValueError(f"unknown loss {loss!r}")


# ---------------------------------------------------------------- public entry points
def bilinear(
    layers: list[Layer], params: Params, x: Array, y: Labels, u: Array, v: Array, *, timesteps: int, loss: str
) -> tuple[float, Array, Array]:
    """(loss, u @ g [B1], u @ H @ v.T [B1, B2]) for direction matrices u [B1, P] and v [B2, P]; see `hessian`."""
    weights: dict[str, Dual] = {}
    offset = 0
    for name, array in params.items():
        value = np.asarray(array, np.float64)
        here = slice(offset, offset := offset + value.size)
        zero = np.zeros((1, 1, *value.shape))
        e1, e2 = u[:, here].reshape(-1, 1, *value.shape), v[:, here].reshape(1, -1, *value.shape)
        weights[name] = Dual(value[None, None], e1 if e1.any() else zero, e2 if e2.any() else zero, zero)
    images = np.repeat(np.asarray(x, np.float64)[None, None, None], timesteps, axis=2)
    spikes = _forward(layers, weights, Dual.constant(images))
    result = _loss(spikes.map(lambda part: part.mean(2)), y, loss)
    shape = (len(u), len(v))
    return float(result.a[0, 0]), np.broadcast_to(result.e1, (len(u), 1))[:, 0], np.broadcast_to(result.e12, shape)


def hessian(
    layers: list[Layer], params: Params, x: Array, y: Labels, *, timesteps: int, loss: str, mirror: bool = True
) -> tuple[float, Array, Array]:
    """(loss, gradient [P], Hessian [P, P]) of the network `layers` at `params`, under the surrogate 2-jet rule.

    layers: {"kind": "conv" | "linear", "weight": name}; {"kind": "norm", "weight": name, "bias": name, "mean": array,
    "var": array}; {"kind": "pool", "ties": "first" | "last"}; {"kind": "flatten"}; {"kind": "neuron", "threshold":
    float, "v_reset": float, "decay": float, "gain": float (or "logit": name, PLIF, in place of these two), "reset":
    "hard" | "soft", "detach_reset": bool, "spike": (f', f'')} with, optionally, "primitive": F in place of the step and
    "recurrent": name of V [M, M], V s[t-1] being added to the current; {"kind": "residual", "layers": [...]}: what
    these layers make of their input is added to it.
    params: their order is the flat layout (row-major, concatenated). x [N, ...] is repeated `timesteps` times; y [N].
    loss: "mse" or "ce" of the last layer's output averaged over time. The directions are unit vectors, BLOCK at a time;
    mirror=False computes both triangles, so that the symmetry of the result is a finding and not a construction.
    """
    size = sum(np.size(array) for array in params.values())
    unit = np.eye(size)
    gradient, matrix, value = np.zeros(size), np.zeros((size, size)), 0.0
    for i in range(0, size, BLOCK):
        for j in range(i if mirror else 0, size, BLOCK):
            rows, cols = slice(i, i + BLOCK), slice(j, j + BLOCK)
            value, gradient[rows], matrix[rows, cols] = bilinear(
                layers, params, x, y, unit[rows], unit[cols], timesteps=timesteps, loss=loss
            )
            if mirror and j > i:
                matrix[cols, rows] = matrix[rows, cols].T
    return value, gradient, matrix
