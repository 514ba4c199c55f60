"""Names of the figures, without the code that draws them."""

FIGURE_NAMES = (
    *("start", "gain", "epochs", "ranks", "one-image", "gap", "robustness"),
    *("training", "layers", "samples", "calibration"),
)
