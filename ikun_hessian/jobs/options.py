"""The options of the commands, as tables: the one schema of the command line and of presets.

The command line is generated from these tables (cli.click_options), and the tables of a preset are checked against
them (schema.read_options). This module does not import click, torch or NumPy.
"""

from __future__ import annotations

from pathlib import Path

from ikun.adapters.choices import LIBRARIES, READOUTS
from ikun_hessian.jobs.schema import Option

MOST_MEMORY = 2.0**30  # GiB
CE = dict.fromkeys(("cross_entropy", "cross-entropy", "crossentropy"), "ce")
DATA_DIR = Option(
    "data-dir", Path, None, "Folder with the files of the data set [default: the download cache].", preset=False
)
DEVICE = Option(
    "device", str, "auto", "Device to compute on.", metavar="auto, cpu, cuda or cuda:N",
    pattern="auto|cpu|cuda(:[0-9]{1,3})?|mps", preset=False,  # mps is refused with the reason
)  # fmt: skip
JSON = Option("json", bool, False, "Print JSON to standard output, and nothing else.", renamed="as_json", preset=False)
DAMPING = Option(
    "damping", float, None, "Damping z of effective dimension and log-determinant [default: 1% of lambda_max]."
)

OPENING = (  # how to open a checkpoint, and on which data
    Option("samples", str, "all", 'Number of samples, or "all".'),
    Option("split", str, "train", "Split of the data set.", choices=("train", "test")),
    Option(
        "batch-size", int, None, "Samples per forward pass [default: as many as fit into a quarter of --memory].",
        positive=True,
    ),
    Option("params", str, "*", "Pattern of parameter names, for example 'fc*'."),
    Option("surrogate", str, None, "Analyse with this surrogate instead of the one used in training."),
    Option("dtype", str, "float32", "Floating-point type of the computation.", choices=("float32", "float64")),
    Option(
        "memory", float, None,
        "Memory in GiB for kept intermediate values and eigenvectors [default: half of the memory].",
        positive=True, most=MOST_MEMORY, preset=False,
    ),
    DATA_DIR,
    DEVICE,
)  # fmt: skip
OPENING_PARAMETERS = tuple(option.parameter for option in OPENING if option.preset)

OWN = (  # a network of the user's own: the fields of jobs.job.Own
    Option("model", help="Your network: a function that builds it. This runs your code.", metavar="MODULE:FUNCTION"),
    Option(
        "data", help="Your samples: a function that returns inputs and targets, a data set, or batches.",
        metavar="MODULE:FUNCTION",
    ),
    Option(
        "loss", help="mse (of one-hot rates), ce, tet[:WEIGHT] (over time), or MODULE:FUNCTION, a mean over samples.",
        metavar="LOSS", aliases=CE,
    ),
    Option("library", help="Library of your network [default: detected from its layers].", choices=LIBRARIES),
    Option("timesteps", int, None, "Number of steps to run it for [default: it contains its own loop over time]."),
    Option("sequences", bool, False, "Samples are sequences [T, ...], with one input per step."),
    Option("time-first", bool, None, "Order of the axes of its inputs and outputs.", opposite="batch-first"),
    Option("output", help="Which output to use of several: spikes (the first), membrane (the last), a number or name."),
    Option(
        "readout", help="How to reduce the output over time; none: the loss gets [N, T, K].", choices=READOUTS
    ),
    Option(
        "valid", help="Entry of the inputs with the mask [N, T] or the lengths [N] of padded sequences.",
        metavar="NAME",
    ),
    Option("time-first-data", bool, False, "The batches of --data have time as the first axis, [T, N, ...]."),
    Option(
        "replace-surrogate", help="Use this surrogate in place of those that cannot be differentiated twice.",
        metavar="NAME:P",
    ),
    Option(
        "reset", help="MODULE:FUNCTION that clears the network's state; for a .nir file: hard or soft.",
        metavar="RESET",
    ),
    Option("dt", float, None, "Time step of a .nir file, in the unit of its time constants."),
)  # fmt: skip

RESULTS = (  # where the results of an analysis go
    Option("seed", int, 0, "Random seed.", least=0, preset=False),
    Option(
        "out",
        Path,
        None,
        "Folder for results [default: that of the checkpoint].",
        path="folder",
        preset=False,
        letter="o",
    ),
    Option("tag", help="Part of the names of the results, to keep results of several settings.", preset=False),
    Option(
        "force", bool, False, "Overwrite a result of other settings, or discard an interrupted analysis.", preset=False
    ),
    Option("resume", bool, False, "Resume an interrupted analysis, and keep finished results.", preset=False),
    Option(
        "caption",
        bool,
        True,
        "Whether figures have a caption with their provenance.",
        renamed="captioned",
        opposite="no-caption",
        preset=False,
    ),
    JSON,
)

TRAIN = (
    Option(
        "data", str, "digits", "digits, fashion-mnist, cifar10, image-folder, spike-times, n-mnist. Data set.",
        renamed="data_name", choices="ikun.data.datasets:DATASETS",
    ),
    Option("image-size", int, None, "Side length in pixels to which images of image-folder are resized and cropped."),
    Option(
        "model", str, "csnn", "csnn, mlp, resnet, rsnn. csnn is the paper's network; rsnn is recurrent.",
        choices="ikun.networks:MODELS",
    ),
    Option("depth", int, 2, "Number of convolutions (csnn) or of residual blocks (resnet)."),
    Option(
        "norm", str, "bn", "none, bn, tdbn. bn: BatchNorm; tdbn: BatchNorm whose scale starts at the threshold.",
        choices="ikun.networks:NORMS",
    ),
    Option("dropout", float, 0.0, "Fraction of hidden neurons dropped during training."),
    Option(
        "init", str, "ikun",
        "ikun, ikun_v1, ikun_v2, xavier, kaiming, lecun, normal, orthogonal, delta_orthogonal, lsuv, fluctuation, "
        "firing, two_sided, relay, gradient_stable, tdbn. Initializer of the weights.",
        choices="ikun.initializers.names:INITIALIZERS",
    ),
    Option(
        "alpha", float, None,
        "Parameter alpha of ikun and tdbn [default: 0.1 for ikun, where 1 is the literal reading of the paper; 1 for "
        "tdbn].",
    ),
    Option("gain", float, 1.0, "Factor on the variance of the initial weights."),
    Option(
        "law", str, "empirical",
        "empirical, analytic. Distribution of the membrane potential that ikun and firing assume.",
        choices="ikun.initializers.names:LAWS",
    ),
    Option(
        "surrogate", str, "atan:2",
        "atan, sigmoid, tanh, triangle, linear, fast_sigmoid, superspike, softsign, piecewise_exp, erf, gaussian, "
        "rect. Surrogate derivative, and its parameter P.",
        choices="ikun.surrogates:FAMILIES", metavar="NAME[:P]",
    ),
    Option("neuron", str, "if", "if, lif, plif. Neuron model.", choices="ikun.neurons:NEURONS"),
    Option("tau", float, 2.0, "Membrane time constant in steps (lif), or its initial value (plif)."),
    Option("reset", str, "hard", "hard, soft. Reset after a spike.", choices="ikun.neurons:RESETS"),
    Option("detach-reset", bool, False, "Do not differentiate through the reset."),
    Option(
        "timesteps", int, None,
        "Number of time steps T, and of frames of events [default: 4, 10 for events, or that of the spike trains].",
    ),
    Option(
        "coding", str, None,
        "direct, poisson, spikes. Encoding of the inputs [default: direct, or spikes for spike trains and events].",
        choices="ikun.data.encoding:CODINGS",
    ),
    Option("channels", int, 16, "Number of channels C (csnn, resnet)."),
    Option("hidden", str, "128,128", "Sizes of the hidden layers (mlp, rsnn)."),
    Option("loss", str, "mse", "mse, ce. mse is computed from firing rates.", choices="ikun.losses:LOSSES", aliases=CE),
    Option("optimizer", str, "adam", "adam, sgd. Optimizer.", choices="ikun.training.spec:OPTIMIZERS"),
    Option("momentum", float, 0.9, "Momentum of sgd."),
    Option("lr", float, 1e-3, "Learning rate."),
    Option(
        "schedule", str, "cosine", "cosine, step, none. Schedule of the learning rate.",
        choices="ikun.training.spec:SCHEDULES",
    ),
    Option("weight-decay", float, 0.0, "Weight decay."),
    Option(
        "sam", float, 0.0,
        "Radius of sharpness-aware minimization, which looks for flat minima and takes two gradients per batch; for "
        "example 0.05. 0: plain training.",
        metavar="RHO",
    ),
    Option("asam", bool, False, "Adaptive sharpness-aware minimization with the radius --sam, for example 0.5."),
    Option(
        "sam-forward", str, "spiking",
        "spiking, relaxed. Train on spikes or on relaxed spikes, also without --sam.",
        choices="ikun.training.spec:FORWARDS",
    ),
    Option("relaxed-accuracy", bool, False, "Also log the test accuracy of the relaxed network."),
    Option("epochs", int, 20, "Number of epochs."),
    Option("batch-size", int, 128, "Samples per batch."),
    Option("patience", int, 0, "Stop after this many epochs without a lower held-out loss; 0 trains all epochs."),
    Option("held-out", int, 0, "Training samples held out for --patience [default with --patience: 10%]."),
    Option("subset", int, None, "Number of training samples [default: all]."),
    Option("seed", int, 42, "Random seed.", least=0, preset=False),
    Option("snapshots", int, 0, "Number of checkpoints saved during training."),
    Option(
        "save-at-loss", float, (),
        "Also save NAME.lossX.pt after the first epoch with a training loss of at most X. The loss is the one in the "
        "log: the mean over the batches, with dropout. Repeatable.",
        multiple=True, metavar="X",
    ),
    Option("resume", bool, False, "Resume an interrupted run.", preset=False),
    Option("force", bool, False, "Overwrite an existing checkpoint or interrupted run.", preset=False),
    Option("out", Path, Path("ckpt.pt"), "File of the checkpoint.", path="file", preset=False, letter="o"),
    DATA_DIR,
    DEVICE,
)  # fmt: skip

SPECTRUM = (
    Option("top", int, 10, "Number of largest eigenvalues."),
    Option("smallest", int, 5, "Number of smallest (most negative) eigenvalues."),
    Option("scaled", int, 1, "Number of largest eigenvalues with the weights in units of their filters' norms."),
    Option(
        "magnitude", int, 0, "Compute the N eigenvalues largest in magnitude (replaces --top and --smallest).",
        metavar="N",
    ),
    Option("method", str, "lanczos", "Eigenvalue algorithm.", choices=("lanczos", "power")),
    Option("backend", str, "own", "Implementation: this package or PyHessian.", choices=("own", "pyhessian")),
    Option(
        "operator", str, (),
        "hessian, ggn, fisher, relaxed, smoothed or true (the Hessian of the smoothed spiking loss itself, from "
        "forward passes only). Repeatable [default: hessian and ggn].",
        renamed="operators", multiple=True,
    ),
    Option("density", bool, True, "Whether to estimate the spectral density.", opposite="no-density"),
    Option("steps", int, None,
        "Lanczos steps per density probe [default: at most 60, until half as many give the same to 0.3% of its "
        "range, or chosen by --accuracy].",
    ),
    Option("probes", int, None, "Number of density probes [default: 2 to 4, or chosen by --accuracy]."),
    Option(
        "accuracy", float, None,
        "Wasserstein accuracy of the density, relative to the range of the spectrum. Chooses --steps and --probes.",
    ),
    Option(
        "exact", bool, None,
        "Compute all eigenvalues of the GGN without probes. Needs few samples: at most 8192 samples times outputs "
        "[default: up to 1500, where it takes no more time].", opposite="no-exact",
    ),
    DAMPING,
    Option(
        "noise", float, 0.1,
        "Standard deviation of the weight noise of operators smoothed and true, relative to each filter's RMS.",
    ),
    Option(
        "time", str, None,
        "Time that the analysis of a checkpoint may take, for example 5m. What does not fit is left out, and a warning "
        "says what.",
        metavar="TIME",
    ),
    Option("tol", float, None,
        "Residual, relative to the norm, at which an eigenpair has converged [default: a tenth of the eigenvalue's "
        "error from the data, from 0.0001 to 0.01].",
    ),
    Option(
        "per-layer", bool, False,
        "Also analyse the diagonal block of each layer, for the first operator; .layers.csv has a row per layer.",
    ),
    Option(
        "per-step", bool, False,
        "Also estimate the trace of the GGN of the loss that is read out at each time step, as .steps.csv.",
    ),
    Option(
        "diagonal", bool, False,
        "Also compute the diagonal of every operator with its errors, in the .npz file: exactly for the GGN of few "
        "samples, else from --diagonal-probes.",
    ),
    Option("diagonal-probes", int, 64, "Number of probes of --diagonal."),
    Option("save-vectors", bool, False, "Also save the eigenvectors in the .npz file.", renamed="vectors"),
    Option(
        "samples-curve", str, None, "Also measure eigenvalues and trace on subsets of these sizes.",
        renamed="curve", metavar="N,N,...",
    ),
    Option("resamples", int, 5, "Number of random subsets of each size of --samples-curve."),
    Option(
        "draws", int, None,
        "Number of weight perturbations for the sharpness of the loss itself, by forward passes only; 0 for none "
        "[default: 8]. With operator true: number of its forward passes [default: 4000].",
    ),
    Option(
        "trajectory", bool, False,
        "Treat the checkpoints as snapshots of one run, and plot them against the epoch, or in the order given if they "
        "are of a network of your own.",
        preset=False,
    ),
    *OPENING,
)  # fmt: skip

FLATNESS = (
    Option(
        "operator", str, (), "Also measure the noise-matched operator. The GGN and the Hessian are always measured.",
        renamed="operators", multiple=True, choices=("smoothed",),
    ),
    Option(
        "noise", float, (),
        "Standard deviation of the weight noise of --operator smoothed and of --calibrate, relative to each filter's "
        "RMS. Repeatable [default: 0.1; for --calibrate 0.05, 0.1, 0.2, 0.4].",
        multiple=True,
    ),
    Option("radius", float, 0.1, "Radius of average sharpness, relative to the weight norm."),
    Option("rho", float, 0.01, "Radius of SAM, m-sharpness and worst-case sharpness, relative to the weight norm."),
    Option("draws", int, 32, "Number of noise samples, in antithetic pairs."),
    DAMPING,
    Option(
        "calibrate", bool, False, "Also measure which operator predicts the true loss of this network.", preset=False
    ),
    *OPENING,
)  # fmt: skip

ROBUSTNESS = (  # not a command: a table of presets
    Option(
        "corruptions", str, ("gaussian_noise", "blur", "contrast", "occlusion"), multiple=True,
        choices="ikun.data.corruptions:CORRUPTIONS",
    ),
    Option("severities", int, (1, 3, 5), multiple=True),
    Option("noise", float, (0.1, 0.2, 0.4), multiple=True),
    Option("draws", int, 16),
    Option("samples", str, "all"),
)  # fmt: skip
