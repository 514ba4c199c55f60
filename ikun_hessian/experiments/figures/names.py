"""Names of the figures of a study. This module does not import the code that draws them."""

FIGURE_NAMES = (
    *("start", "gain", "depth", "epochs", "ranks", "one-image", "gap", "robustness"),
    *("training", "layers", "samples", "calibration"),
)
