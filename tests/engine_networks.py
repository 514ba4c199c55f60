"""Networks for the tests of traced products, one or more for everything that torch offers.

Every entry of `NETWORKS` is small: its products are compared to those of double backward.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hessian_tools.objective import Objective, make_objective


class Net(nn.Module):
    """A network given by its forward pass, a function of the network and its inputs, and its modules."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Attributes:
        build: Makes the network.
        shape: Shape of one sample.
        loss: A name in `LOSSES`.
        params: The selected parameters.
        ints: Samples are integers below this number. 0: they are normal.
        tol: Largest relative error.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: str = "ce"
    params: str = "*"
    ints: int = 0
    tol: float = 1e-10


NETWORKS: dict[str, Case] = {}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": F.cross_entropy,
    "curved": lambda o, y: (torch.sin(o) - y).square().reshape(len(o), -1).sum(1).mean(),
    "linear": lambda o, y: o.sum() / len(o),
    "constant": lambda o, y: torch.ones((), dtype=o.dtype),
}
seq = nn.Sequential


def add(name: str, shape: tuple[int, ...], build: Callable[[], nn.Module], **fields: Any) -> None:
    NETWORKS[name] = Case(build, shape, **fields)


def head(channels: int) -> nn.Module:
    return seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def objective_of(case: Case, samples: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Objective:
    """The objective of a network with random weights and running statistics."""
    torch.manual_seed(seed)
    model = case.build()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(0, 0.3)
            if name.endswith("running_var"):
                b.uniform_(0.4, 1.5)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and m.affine:
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
    model = model.to(dtype).eval()
    size = (samples, *case.shape)
    x = torch.randint(case.ints, size) if case.ints else torch.randn(size, dtype=dtype)
    with torch.no_grad():
        outputs = model(x)
    if case.loss == "ce":
        y = torch.arange(outputs[:, 0].numel()).reshape(outputs[:, 0].shape) % 3
    else:
        y = torch.randn(outputs.shape, dtype=dtype)
    return make_objective(model, LOSSES[case.loss], (x, y), params=case.params, check=False)


add("mlp", (5,), lambda: seq(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
for act in [
    "ReLU",
    "GELU",
    "SiLU",
    "Softplus",
    "ELU",
    "SELU",
    "CELU",
    "LeakyReLU",
    "Mish",
    "Hardswish",
    "Sigmoid",
    "Tanh",
    "LogSigmoid",
    "Softsign",
    "Hardtanh",
    "PReLU",
    "Softmax",
    "LogSoftmax",
    "GLU",
    "Softmin",
    "Tanhshrink",
    "Softshrink",
    "ReLU6",
]:
    kw = {"dim": 1} if act in ("Softmax", "LogSoftmax", "Softmin") else {}
    out = 4 if act == "GLU" else 8
    add(
        "act_" + act,
        (5,),
        lambda act=act, kw=kw, out=out: seq(nn.Linear(5, 8), getattr(nn, act)(**kw), nn.Linear(out, 3)),
    )
add("act_GELU_tanh", (5,), lambda: seq(nn.Linear(5, 8), nn.GELU("tanh"), nn.Linear(8, 3)))
for norm in ["bn", "gn", "ln", "in", "ina", "lrn", "none", "rms"]:

    def mk(norm=norm):
        m = {
            "bn": lambda: nn.BatchNorm2d(4),
            "gn": lambda: nn.GroupNorm(2, 4),
            "ln": lambda: nn.LayerNorm([4, 6, 6]),
            "in": lambda: nn.InstanceNorm2d(4),
            "ina": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            "lrn": lambda: nn.LocalResponseNorm(2),
            "none": nn.Identity,
            "rms": lambda: nn.RMSNorm([4, 6, 6]),
        }[norm]()
        return seq(nn.Conv2d(2, 4, 3, padding=1), m, nn.Tanh(), head(4))

    add("conv_" + norm, (2, 6, 6), mk)
for name, conv in {
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed_grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "same_even": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
    "nobias": lambda: nn.Conv2d(4, 6, 3, bias=False),
}.items():
    c = 4 if name == "depthwise" else 6
    add(
        "cv_" + name,
        (2, 6, 6),
        lambda conv=conv, c=c: seq(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), conv(), nn.BatchNorm2d(c), nn.Tanh(), head(c)
        ),
    )
add(
    "conv1d",
    (2, 7),
    lambda: seq(
        nn.Conv1d(2, 4, 3),
        nn.BatchNorm1d(4),
        nn.GELU(),
        nn.Conv1d(4, 3, 3),
        nn.Tanh(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    ),
)
add(
    "conv1d_bn_ncl",
    (2, 7),
    lambda: seq(nn.BatchNorm1d(2), nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
)
add(
    "conv3d",
    (2, 4, 4, 4),
    lambda: seq(
        nn.Conv3d(2, 3, 3, padding=1),
        nn.BatchNorm3d(3),
        nn.Tanh(),
        nn.AvgPool3d(2),
        nn.Conv3d(3, 3, 2),
        nn.Flatten(),
        nn.Tanh(),
        nn.Linear(3, 3),
    ),
)
add("convT1d", (2, 5), lambda: seq(nn.ConvTranspose1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(21, 3)))
add("convT3d", (2, 3, 3, 3), lambda: seq(nn.ConvTranspose3d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3)))
add(
    "residual",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: s.h(torch.tanh(s.b1(s.c1(x))) + torch.relu(s.b2(s.c2(s.a(x))))),
        a=nn.Identity(),
        c1=nn.Conv2d(2, 4, 1),
        b1=nn.BatchNorm2d(4),
        c2=nn.Conv2d(2, 4, 3, padding=1),
        b2=nn.BatchNorm2d(4),
        h=head(4),
    ),
)
add(
    "concat",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: s.h(torch.cat([torch.tanh(s.c1(x)), torch.sin(s.c2(x)), x], 1)),
        c1=nn.Conv2d(2, 3, 1),
        c2=nn.Conv2d(2, 3, 3, padding=1),
        h=head(8),
    ),
)


def tied():
    layer = nn.Linear(5, 5)
    return seq(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))


add("shared", (5,), tied)


def tiedw():
    m = Net(
        lambda s, x: F.linear(torch.tanh(F.linear(torch.tanh(s.a(x)), s.b.weight)), s.a.weight.T @ s.a.weight[:, :5])[
            :, :3
        ],
        a=nn.Linear(5, 5),
        b=nn.Linear(5, 5, bias=False),
    )
    m.b.weight = m.a.weight
    return m


add("tied_weight", (5,), tiedw)


def cell_loop(cell, lstm=False):
    def f(s, x):
        h = x.new_zeros(len(x), 4)
        h = (h, h) if lstm else h
        for t in range(x.shape[1]):
            h = s.c(x[:, t], h)
        return s.l(h[0] if lstm else h)

    return Net(f, c=cell, l=nn.Linear(4, 3))


add("gru_cell", (3, 5), lambda: cell_loop(nn.GRUCell(5, 4)))
add("lstm_cell", (3, 5), lambda: cell_loop(nn.LSTMCell(5, 4), True))
add("rnn_cell", (3, 5), lambda: cell_loop(nn.RNNCell(5, 4)))
add(
    "handmade_rnn",
    (3, 5),
    lambda: Net(
        lambda s, x: s.l(
            functools.reduce(lambda h, t: torch.tanh(s.i(x[:, t]) + s.h(h)), range(3), x.new_zeros(len(x), 4))
        ),
        i=nn.Linear(5, 4),
        h=nn.Linear(4, 4),
        l=nn.Linear(4, 3),
    ),
)
for r in ["LSTM", "GRU", "RNN"]:
    for kw in [{}, {"bidirectional": True, "num_layers": 2}]:
        add(
            f"{r}{len(kw)}",
            (3, 5),
            lambda r=r, kw=kw: Net(
                lambda s, x: s.l(s.r(x)[0][:, -1]),
                r=getattr(nn, r)(5, 4, batch_first=True, **kw),
                l=nn.Linear(4 * (2 if kw else 1), 3),
            ),
        )
add(
    "LSTMproj",
    (3, 5),
    lambda: Net(lambda s, x: s.l(s.r(x)[0][:, -1]), r=nn.LSTM(5, 4, batch_first=True, proj_size=2), l=nn.Linear(2, 3)),
)
add(
    "mha",
    (3, 4),
    lambda: Net(
        lambda s, x: s.l(s.a(x, x, x, need_weights=False)[0].mean(1)),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
        l=nn.Linear(4, 3),
    ),
)
add(
    "mha_w",
    (3, 4),
    lambda: Net(
        lambda s, x: s.l(s.a(x, x, x)[0].mean(1)), a=nn.MultiheadAttention(4, 2, batch_first=True), l=nn.Linear(4, 3)
    ),
)
add(
    "encoder",
    (3, 4),
    lambda: Net(
        lambda s, x: s.l(s.a(x).mean(1)),
        a=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.1),
        l=nn.Linear(4, 3),
    ),
)
add(
    "encoder_gelu_prenorm",
    (3, 4),
    lambda: Net(
        lambda s, x: s.l(s.a(x, src_mask=nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)).mean(1)),
        a=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True, activation="gelu"),
        l=nn.Linear(4, 3),
    ),
)
add(
    "encoder_stack",
    (3, 4),
    lambda: Net(
        lambda s, x: s.l(s.a(x).mean(1)),
        a=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
        l=nn.Linear(4, 3),
    ),
)
add(
    "sdpa",
    (3, 4),
    lambda: Net(
        lambda s, x: s.l(
            F.scaled_dot_product_attention(s.q(x)[:, None], s.k(x)[:, None], x[:, None], is_causal=True)[:, 0].mean(1)
        ),
        q=nn.Linear(4, 4),
        k=nn.Linear(4, 4),
        l=nn.Linear(4, 3),
    ),
)
add("embedding", (3,), lambda: seq(nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), ints=7)
add(
    "embedding_pad_maxnorm",
    (3,),
    lambda: seq(nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3)),
    ints=7,
)
add("layernorm", (5,), lambda: seq(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)))
for p, m in {
    "max": lambda: nn.MaxPool2d(2),
    "max_ov": lambda: nn.MaxPool2d(3, 2, 1),
    "max_dil": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "max_ceil": lambda: nn.MaxPool2d(4, 3, ceil_mode=True),
    "avg": lambda: nn.AvgPool2d(2),
    "avg_pad": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ada_max": lambda: nn.AdaptiveMaxPool2d(2),
    "ada_avg": lambda: nn.AdaptiveAvgPool2d((4, 3)),
    "lp": lambda: nn.LPPool2d(2, 2),
    "none": nn.Identity,
}.items():
    add(
        "pool_" + p,
        (2, 6, 6),
        lambda m=m: seq(nn.Conv2d(2, 4, 3, padding=1), nn.Sigmoid(), m(), nn.Conv2d(4, 3, 1), nn.Tanh(), head(3)),
    )
add(
    "maxunpool",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: s.h(torch.tanh(F.max_unpool2d(*F.max_pool2d(s.c(x), 2, return_indices=True), 2))),
        c=nn.Conv2d(2, 4, 3, padding=1),
        h=head(4),
    ),
)
for mode in ["nearest", "bilinear", "bicubic", "area", "nearest-exact"]:
    add(
        "interp_" + mode,
        (2, 4, 4),
        lambda mode=mode: Net(
            lambda s, x: s.h(torch.tanh(F.interpolate(torch.tanh(s.c(x)), scale_factor=2, mode=mode))),
            c=nn.Conv2d(2, 4, 3, padding=1),
            h=head(4),
        ),
    )
add(
    "interp_linear",
    (2, 4),
    lambda: Net(
        lambda s, x: s.h(F.interpolate(torch.tanh(s.c(x)), size=7, mode="linear").flatten(1).tanh()),
        c=nn.Conv1d(2, 3, 1),
        h=nn.Linear(21, 3),
    ),
)
add("pixelshuffle", (2, 4, 4), lambda: seq(nn.Conv2d(2, 8, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(), head(2)))
add(
    "grid_sample",
    (2, 4, 4),
    lambda: Net(
        lambda s, x: s.h(
            torch.tanh(
                F.grid_sample(
                    torch.tanh(s.c(x)),
                    F.affine_grid(
                        torch.eye(2, 3, dtype=x.dtype)[None].expand(len(x), 2, 3) * 0.7,
                        (len(x), 4, 4, 4),
                        align_corners=False,
                    ),
                    align_corners=False,
                )
            )
        ),
        c=nn.Conv2d(2, 4, 3, padding=1),
        h=head(4),
    ),
)
add(
    "einsum",
    (3, 4),
    lambda: Net(
        lambda s, x: torch.einsum("nij,jk,kl->nl", x, torch.tanh(s.a.weight), s.b.weight).tanh(),
        a=nn.Linear(4, 4),
        b=nn.Linear(3, 4),
    ),
)
add(
    "bilinear",
    (5,),
    lambda: Net(lambda s, x: torch.tanh(s.b(x, torch.tanh(s.a(x)))), a=nn.Linear(5, 4), b=nn.Bilinear(5, 4, 3)),
)
add(
    "inplace_relu",
    (2, 6, 6),
    lambda: seq(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        head(4),
    ),
)
add(
    "inplace_add",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: (lambda y: s.h(y.add_(torch.tanh(s.d(x))).mul_(2).tanh_()))(s.c(x)),
        c=nn.Conv2d(2, 4, 3, padding=1),
        d=nn.Conv2d(2, 4, 1),
        h=head(4),
    ),
)


def slices(s, x):
    y = torch.tanh(s.a(x))
    z = torch.zeros(len(x), 6, dtype=x.dtype)
    z[:, :3] = y[:, :3]
    z[:, 3:] = y[:, 3:] ** 2
    z[:, 1] *= 2
    z += 1
    z[:, 0].mul_(3)
    return s.b(y * z)


add("slices", (5,), lambda: Net(slices, a=nn.Linear(5, 6), b=nn.Linear(6, 3)))


def bn_inplace_after(s, x):
    y = s.c(x)
    y += 1
    return s.h(torch.tanh(s.n(y)))


add(
    "bn_after_inplace_add",
    (2, 6, 6),
    lambda: Net(bn_inplace_after, c=nn.Conv2d(2, 4, 3), n=nn.BatchNorm2d(4), h=head(4)),
)
add(
    "bn_reused",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: (lambda y: s.h(torch.tanh(s.n(y)) * y + s.m(y)))(s.c(x)),
        c=nn.Conv2d(2, 4, 3),
        n=nn.BatchNorm2d(4),
        m=nn.BatchNorm2d(4),
        h=head(4),
    ),
)
add("bn_bn", (2, 6, 6), lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Tanh(), head(4)))
add("bn_before", (2, 6, 6), lambda: seq(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.Tanh(), nn.BatchNorm2d(4), head(4)))
add("bn_mom_none", (2, 6, 6), lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Tanh(), head(4)))
add("bn_no_affine", (2, 6, 6), lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Tanh(), head(4)))
add("bn_linear", (5,), lambda: seq(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3)))
add("bn_linear_3d", (4, 5), lambda: seq(nn.Linear(5, 6), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)))
add(
    "bn_flat_view",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: s.l(torch.tanh(s.n(s.c(x).flatten(1)))),
        c=nn.Conv2d(2, 2, 3),
        n=nn.BatchNorm1d(32),
        l=nn.Linear(32, 3),
    ),
)
add(
    "bn_reshaped_chan",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: s.l(torch.tanh(s.n(s.c(x).reshape(len(x), 4, 4, 2).flatten(2)).flatten(1))),
        c=nn.Conv2d(2, 2, 3),
        n=nn.BatchNorm1d(4),
        l=nn.Linear(32, 3),
    ),
)
add(
    "repeat_same",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: (
            s.h(torch.tanh(s.c(x.unsqueeze(0).repeat(4, 1, 1, 1, 1).flatten(0, 1)))).unflatten(0, (4, -1)).mean(0)
        ),
        c=nn.Conv2d(2, 4, 3),
        h=head(4),
    ),
)
add(
    "repeat_diff",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: (
            s.h(
                torch.tanh(
                    s.c(
                        (
                            x.unsqueeze(0).repeat(3, 1, 1, 1, 1) + torch.arange(3, dtype=x.dtype).view(3, 1, 1, 1, 1)
                        ).flatten(0, 1)
                    )
                )
            )
            .unflatten(0, (3, -1))
            .mean(0)
        ),
        c=nn.Conv2d(2, 4, 3),
        h=head(4),
    ),
)


def rep_late(s, x):
    y = x.unsqueeze(0).repeat(4, 1, 1, 1, 1)
    y = s.c(y.flatten(0, 1)).unflatten(0, (4, -1))
    y = torch.tanh(y * torch.arange(1, 5, dtype=x.dtype).view(4, 1, 1, 1, 1))
    return s.h(y.flatten(0, 1)).unflatten(0, (4, -1)).mean(0)


add("repeat_late", (2, 6, 6), lambda: Net(rep_late, c=nn.Conv2d(2, 4, 3), h=head(4)))


def rep_inplace(s, x):
    y = x.unsqueeze(0).repeat(4, 1, 1, 1, 1)
    y[1] += 1
    y = s.c(y.flatten(0, 1))
    return s.h(torch.tanh(y)).unflatten(0, (4, -1)).mean(0)


add("repeat_inplace", (2, 6, 6), lambda: Net(rep_inplace, c=nn.Conv2d(2, 4, 3), h=head(4)))


def rep_inplace_out(s, x):
    y = x.unsqueeze(0).repeat(4, 1, 1, 1, 1)
    y = s.c(y.flatten(0, 1))
    y[4:8] += 1
    return s.h(torch.tanh(y)).unflatten(0, (4, -1)).mean(0)


add("repeat_inplace_out", (2, 6, 6), lambda: Net(rep_inplace_out, c=nn.Conv2d(2, 4, 3), h=head(4)))
add(
    "repeat_expand",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: s.h(torch.tanh(s.c(x.expand(4, *x.shape).flatten(0, 1)))).unflatten(0, (4, -1)).mean(0),
        c=nn.Conv2d(2, 4, 3),
        h=head(4),
    ),
)
add(
    "repeat_stack",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: s.h(torch.tanh(s.c(torch.stack([x] * 4).flatten(0, 1)))).unflatten(0, (4, -1)).mean(0),
        c=nn.Conv2d(2, 4, 3),
        h=head(4),
    ),
)
add(
    "repeat_wrong_axis",
    (5,),
    lambda: Net(
        lambda s, x: s.b(torch.tanh(s.a(x[None].repeat(4, 1, 1).transpose(0, 1).reshape(-1, 5)))).reshape(len(x), 4, 3)[
            :, 0
        ],
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
    ),
)
add(
    "repeat_linear3",
    (5,),
    lambda: Net(
        lambda s, x: s.b(torch.tanh(s.a(x[None].repeat(4, 1, 1)))).mean(0), a=nn.Linear(5, 6), b=nn.Linear(6, 3)
    ),
)
add(
    "repeat_bn",
    (2, 6, 6),
    lambda: Net(
        lambda s, x: (
            s.h(torch.tanh(s.n(s.c(x[None].repeat(4, 1, 1, 1, 1).flatten(0, 1))))).unflatten(0, (4, -1)).mean(0)
        ),
        c=nn.Conv2d(2, 4, 3),
        n=nn.BatchNorm2d(4),
        h=head(4),
    ),
)
add(
    "repeat_channels_reshape",
    (4, 6),
    lambda: Net(
        lambda s, x: (
            s.l(torch.tanh(x[None].repeat(4, 1, 1, 1).reshape(4 * len(x), 24) @ s.w.weight))
            .reshape(4, len(x), 3)
            .mean(0)
        ),
        w=nn.Linear(6, 24),
        l=nn.Linear(6, 3),
    ),
)
add(
    "repeat_linear_T_first_reshape",
    (5,),
    lambda: Net(
        lambda s, x: s.b(torch.tanh(s.a(x[None].repeat(4, 1, 1).reshape(4, -1)))).reshape(-1, 3)[: len(x)],
        a=nn.Linear(20, 15),
        b=nn.Linear(15, 12),
    ),
)


# parametrizations
def pn(f):
    def b():
        m = seq(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        f(m[0])
        return m

    return b


add("weight_norm_p", (5,), pn(parametrizations.weight_norm))


def old_wn(m):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m)


add("weight_norm_old", (5,), pn(old_wn))
add("spectral_norm_p", (5,), pn(parametrizations.spectral_norm))
add(
    "orthogonal_p",
    (5,),
    lambda: seq(nn.Linear(5, 6), parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
)
add(
    "orthogonal_cayley",
    (5,),
    lambda: seq(
        nn.Linear(5, 6),
        parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"),
        nn.Tanh(),
        nn.Linear(6, 3),
    ),
)
add("pruned", (5,), pn(lambda m: prune.l1_unstructured(m, "weight", 0.3)))
add(
    "unused",
    (5,),
    lambda: (lambda m: (setattr(m, "u", nn.Linear(2, 2)), m)[1])(
        Net(lambda s, x: s.b(torch.tanh(s.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    ),
)
add(
    "params_sel",
    (5,),
    lambda: seq(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)),
    params="2.*",
)
add(
    "params_first", (2, 6, 6), lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), head(4)), params="0.weight"
)
add("params_bn", (2, 6, 6), lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), head(4)), params="1.*")
add("params_bnw", (2, 6, 6), lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), head(4)), params="1.weight")
add("params_last", (2, 6, 6), lambda: seq(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), head(4)), params="3.2.bias")
add("linear_model", (5,), lambda: nn.Linear(5, 3))
add(
    "fft",
    (6,),
    lambda: Net(lambda s, x: s.b(torch.fft.rfft(torch.tanh(s.a(x))).abs()), a=nn.Linear(6, 6), b=nn.Linear(4, 3)),
)
add(
    "complex_w",
    (6,),
    lambda: Net(
        lambda s, x: s.b(
            torch.fft.irfft(torch.fft.rfft(torch.tanh(s.a(x))) * torch.view_as_complex(s.w.weight)).tanh()
        ),
        a=nn.Linear(6, 6),
        w=nn.Linear(2, 4, bias=False),
        b=nn.Linear(6, 3),
    ),
)
add(
    "mixed_dtype",
    (5,),
    lambda: Net(lambda s, x: s.b(torch.tanh(s.a(x).float()).to(x.dtype)), a=nn.Linear(5, 6), b=nn.Linear(6, 3)),
    tol=1e-5,
)
add(
    "buffer",
    (5,),
    lambda: (lambda m: (m.register_buffer("k", torch.rand(6)), m)[1])(
        Net(lambda s, x: s.b(torch.tanh(s.a(x) * s.k)), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    ),
)
add(
    "out_vec",
    (5,),
    lambda: Net(lambda s, x: s.b(torch.tanh(s.a(x)))[:, 0], a=nn.Linear(5, 6), b=nn.Linear(6, 1)),
    loss="curved",
)
add(
    "out_map",
    (2, 6, 6),
    lambda: seq(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)),
    loss="curved",
)
add(
    "out_map_ce",
    (2, 6, 6),
    lambda: seq(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)),
    loss="ce",
)
add("loss_linear", (5,), lambda: seq(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), loss="linear")
add("loss_const", (5,), lambda: seq(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), loss="constant")
add("loss_linear_linear", (5,), lambda: nn.Linear(5, 3), loss="linear")
add("no_dependence", (5,), lambda: Net(lambda s, x: x[:, :3] * 2, a=nn.Linear(5, 6)))
add(
    "sort", (5,), lambda: Net(lambda s, x: s.b(torch.tanh(s.a(x)).sort(1).values), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
)
add(
    "topk", (5,), lambda: Net(lambda s, x: s.b(torch.tanh(s.a(x)).topk(4).values), a=nn.Linear(5, 6), b=nn.Linear(4, 3))
)
add(
    "where",
    (5,),
    lambda: Net(
        lambda s, x: s.b(torch.where(s.a(x) > 0, s.a(x) ** 2, torch.sin(s.a(x)))), a=nn.Linear(5, 6), b=nn.Linear(6, 3)
    ),
)
add(
    "cumsum_etc",
    (5,),
    lambda: Net(
        lambda s, x: s.b(
            torch.logsumexp(s.a(x)[:, :, None] * s.a(x)[:, None], 1).cumsum(1).sigmoid() * F.normalize(s.a(x), dim=1)
        ),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
    ),
)
add(
    "linalg",
    (5,),
    lambda: Net(
        lambda s, x: s.b(
            torch.linalg.solve(torch.eye(6, dtype=x.dtype) + s.w.weight @ s.w.weight.T, torch.tanh(s.a(x)).T).T
        ),
        a=nn.Linear(5, 6),
        w=nn.Linear(6, 6),
        b=nn.Linear(6, 3),
    ),
)
add(
    "gather",
    (5,),
    lambda: Net(
        lambda s, x: (
            s.b(torch.tanh(s.a(x)).gather(1, torch.arange(6).flip(0)[None].expand(len(x), -1)))
            + torch.tanh(s.a(x))[:, [0, 2, 1]]
        ),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
    ),
)
add(
    "scatter",
    (5,),
    lambda: Net(
        lambda s, x: s.b(
            torch.zeros(len(x), 6, dtype=x.dtype).scatter_add(
                1, torch.tensor([[0, 1, 1, 2, 5, 5]]).expand(len(x), -1), torch.tanh(s.a(x))
            )
        ),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
    ),
)
add(
    "no_grad_part",
    (5,),
    lambda: Net(
        lambda s, x: s.b(torch.tanh(s.a(x)) * s.ng(x)),
        a=nn.Linear(5, 6),
        ng=Net(lambda s, x: torch.no_grad()(lambda: torch.tanh(s.c(x)))(), c=nn.Linear(5, 6)),
        b=nn.Linear(6, 3),
    ),
)
add(
    "detach_part",
    (5,),
    lambda: Net(
        lambda s, x: s.b(torch.tanh(s.a(x)) * torch.tanh(s.a(x)).detach()), a=nn.Linear(5, 6), b=nn.Linear(6, 3)
    ),
)


def ste(s, x):
    y = s.a(x)
    q = torch.round(y)
    return s.b(torch.tanh(y + (q - y).detach()))


add("straight_through", (5,), lambda: Net(ste, a=nn.Linear(5, 6), b=nn.Linear(6, 3)))


def hook():
    m = seq(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    m[0].register_forward_hook(lambda m, i, o: o * 1.5)
    m[2].register_forward_pre_hook(lambda m, i: (i[0] ** 2,))
    return m


add("hooks", (5,), hook)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


add("old_function", (5,), lambda: Net(lambda s, x: s.b(Cube.apply(s.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3)))


class Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x * x)


add("surrogate_function", (5,), lambda: Net(lambda s, x: s.b(Ste.apply(s.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3)))
add("dropout_eval", (5,), lambda: seq(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)))
add(
    "checkpointed",
    (5,),
    lambda: Net(
        lambda s, x: s.b(torch.utils.checkpoint.checkpoint(s.a, x, use_reentrant=False)),
        a=seq(nn.Linear(5, 6), nn.Tanh()),
        b=nn.Linear(6, 3),
    ),
)
