"""Print what was analysed: the checkpoint, the network, the data and the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hessian_tools.analysis.warnings import learned_nothing
from hessian_tools.io.json import ResultError
from hessian_tools.results.flatness import FlatnessResult
from hessian_tools.results.provenance import AnalysedParts
from hessian_tools.results.spectrum import SpectrumResult
from ikun_hessian.reports.text import field, warning


def not_learned(result: SpectrumResult | FlatnessResult) -> list[str]:
    """Return the lines that say that a network has not learned its task; no lines if it has."""
    classes = result.network.get("classes") or result.data.get("classes")
    text = learned_nothing(result.accuracy, result.loss, classes, result.activity)
    return [*warning(text), ""] if text else []


def opened(r: AnalysedParts) -> list[str]:
    """Return the lines that describe the checkpoint, the network, the data and the training.

    Raises:
        ResultError: If the result lacks some of this information.
    """
    try:
        return _opened(r)
    except (KeyError, TypeError, AttributeError) as error:
        path = r.checkpoint.get("path", "-")
        raise ResultError(f"the result of {path} is incomplete ({error}). Use --force to compute it again") from None


def _opened(r: AnalysedParts) -> list[str]:
    """Return the lines of `opened`, raising KeyError and the like if information is missing."""
    n, t = r.network, r.training
    lines = field("checkpoint", f"{r.checkpoint.get('path', '-')}  sha256 {str(r.checkpoint.get('sha256', '-'))[:12]}")
    if "library" in n:
        lines += [line for name, text in _own(n) for line in field(name, text)]
    elif n:
        analysed = (
            f", analysed with {n['surrogate']}" if n.get("trained_surrogate", n["surrogate"]) != n["surrogate"] else ""
        )
        norm = "BatchNorm in evaluation mode" if n["norm"] == "bn" else "no BatchNorm"
        once = " drawn once" if n["coding"] == "poisson" else ""
        reset = f"{n['reset']} reset{', detached' if n['detach_reset'] else ''}"
        lines += field(
            "network",
            f"{n['model']}, {n['neuron']} neurons, {reset}, surrogate {n.get('trained_surrogate', n['surrogate'])}"
            f"{analysed}, T = {n['timesteps']}, {n['coding']} coding{once}, {norm}, pooling ties: {n['ties']}",
        )
    where = r.device.replace("cpu", "CPU")
    lines += field(
        "parameters", f"{r.num_parameters:,} in {len(r.parameters)} tensors; {r.dtype} on {where}, seed {r.seed}"
    )
    d = r.data
    name = " ".join(part for part in (d.get("name", "-"), d.get("split")) if part)
    lines += field("data", f"{name}, {d['samples']:,} samples, loss {d.get('loss', '-')}")
    if t:
        lines += field(
            "trained",
            f"{t['init']} initializer{_alpha(t)}, {t['optimizer']} lr {t['lr']:g}, {t['schedule']} schedule, "
            f"weight decay {t['weight_decay']:g} (not in the Hessian), batch {t['batch_size']}, "
            f"{_sharpness_aware(t)}{t['epochs_run']} epochs{_kept(t)}, seed {t['seed']}",
        )
    return lines


def _kept(training: dict[str, Any]) -> str:
    """Return the epoch of the weights if it is not the last one."""
    best = training.get("best_epoch", training["epochs_run"])
    return "" if best == training["epochs_run"] else f", weights of epoch {best}"


def _sharpness_aware(training: dict[str, Any]) -> str:
    """Return how training looked for flat minima, and whether it was on relaxed spikes; "" for plain training."""
    parts = [f"{'ASAM' if training.get('asam') else 'SAM'} radius {training['sam']:g}"] if training.get("sam") else []
    parts += ["relaxed spikes"] if training.get("sam_forward") == "relaxed" else []
    return "".join(f"{part}, " for part in parts)


def _alpha(training: dict[str, Any]) -> str:
    """Return the parameters of the initializer."""
    known = {"alpha": training["alpha"]} if training["init"] == "ikun" else {}
    known |= {"gain": training["gain"]} if training.get("gain", 1) != 1 else {}
    return f" ({', '.join(f'{key} {value:g}' for key, value in known.items())})" if known else ""


def output_of(n: Mapping[str, Any]) -> str:
    """Return which output of a network of the user's own is used, in words."""
    chosen = str(n.get("output", "spikes"))
    return {"spikes": "first output", "membrane": "last output"}.get(chosen, f"output {chosen}")


def read_from(n: Mapping[str, Any]) -> str:
    """Return which output of a network of the user's own the loss gets; empty for other networks."""
    if "output" not in n or n.get("timesteps") is None or not n.get("readout"):
        return ""
    return f"; all steps of the {output_of(n)}" if n["readout"] == "none" else f"; {n['readout']} of the {output_of(n)}"


def _own(n: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield entries about a user's network: its library, its time loop, its surrogates, and warnings."""
    library = "plain torch" if n["library"] == "none" else n["library"]
    reset = f", {n['reset']} reset{', detached' if n['detach_reset'] else ''}" if n["reset"] else ""
    neurons = f", {n['neuron']} neurons{reset}" if n["neuron"] else ""
    norm = "BatchNorm in evaluation mode" if n["norm"] == "bn" else "no BatchNorm"
    yield "network", f"{n['model']}, {library}{neurons}, {norm}"
    calls = f"one call for {n['one call']}" if n["one call"] else "run by the network itself"
    if n["timesteps"] is not None:
        readout = "none (the loss gets all steps)" if n["readout"] == "none" else n["readout"]
        read = f", readout: {readout} of the {output_of(n)}" if readout else ""
        padded = f", valid steps: {n['valid']}" if n.get("valid") else ""
        yield "time", f"T = {n['timesteps']}, {calls}{read}{padded}"
    places: dict[str, list[str]] = {}
    for s in n["surrogates"]:
        verdict = f"{s['kind']}{f' ({reason})' if (reason := s['reason']) else ''}"
        used = f", replaced by {n['replacement']}" if s["replaced"] else ""
        places.setdefault(f"{s['label']}: {verdict}{used}", []).append(s["name"])
    for text, names in places.items():
        yield "surrogate", f"{text} ({', '.join(names)})"
    if not places and n["surrogate"]:
        yield "surrogate", n["surrogate"]
    for text in n["warnings"]:
        yield "!", text
