"""Names of the initializers and of the laws of h. This module imports nothing, so that reading the names is fast."""

INITIALIZERS = (
    "ikun",
    "ikun_v1",
    "ikun_v2",
    "xavier",
    "kaiming",
    "lecun",
    "normal",
    "orthogonal",
    "delta_orthogonal",
    "lsuv",
    "fluctuation",
    "firing",
    "two_sided",
    "relay",
    "gradient_stable",
    "tdbn",
)
LAWS = ("empirical", "analytic")
