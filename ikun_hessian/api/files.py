"""Load saved results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hessian_tools.io.json import ResultError, load_result, read_text

if TYPE_CHECKING:
    from ikun_hessian.api.batches import BatchHistogram
    from ikun_hessian.api.flatness import Flatness
    from ikun_hessian.api.landscape import Landscape
    from ikun_hessian.api.spectrum import Analysis
    from ikun_hessian.api.true_hessian import TrueHessian


def load(path: str | Path) -> Analysis | Flatness | Landscape | BatchHistogram | TrueHessian:
    """Load a result that `save` or the command line wrote.

    Args:
        path: NAME.spectrum.json, NAME.flatness.json, NAME.landscape.json, NAME.true.json or NAME.batches.json.

    Returns:
        The result, of the kind that the file holds.

    Raises:
        ResultError: If the file is missing, damaged, or not such a result.
    """
    try:
        raw = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ResultError):
            raise
        raise ResultError(f"{path}: not a JSON file") from None
    kind = str(raw.get("schema")).partition("/")[2].partition("/")[0] if isinstance(raw, dict) else ""
    if kind == "spectrum":
        from hessian_tools.results.spectrum import load_spectrum
        from ikun_hessian.api.spectrum import Analysis

        return Analysis(load_spectrum(path))
    if kind == "flatness":
        from hessian_tools.results.flatness import FLATNESS_SCHEMA, FlatnessResult
        from ikun_hessian.api.flatness import Flatness

        return Flatness(load_result(path, FlatnessResult, FLATNESS_SCHEMA))
    if kind == "landscape":
        from hessian_tools.results.landscape import LANDSCAPE_SCHEMA, LandscapeResult
        from ikun_hessian.api.landscape import Landscape

        return Landscape(load_result(path, LandscapeResult, LANDSCAPE_SCHEMA))
    if kind == "batches":
        from hessian_tools.results.batch_eigenvalues import BATCHES_SCHEMA, BatchEigenvaluesResult
        from ikun_hessian.api.batches import BatchHistogram

        return BatchHistogram(load_result(path, BatchEigenvaluesResult, BATCHES_SCHEMA))
    if kind == "true-hessian":
        from hessian_tools.results.true_hessian import load_true_hessian
        from ikun_hessian.api.true_hessian import TrueHessian

        return TrueHessian(load_true_hessian(path))
    raise ResultError(f"{path}: not a result of analyze, flatness or landscape")
