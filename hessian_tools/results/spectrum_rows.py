"""Tables of a spectrum analysis: one row per layer, or per time step."""

from __future__ import annotations

import math
from typing import Any

from hessian_tools.results.operator_spectrum import Eigenvalue, Trace
from hessian_tools.results.spectrum import SpectrumResult


def layer_of(parameter: str) -> str:
    """Return the name of a parameter's layer: of the module that it is in, or its own name if it is in none."""
    return parameter.rpartition(".")[0] or parameter


def layer_size(result: SpectrumResult, layer: str) -> int:
    """Return the number of parameters of a layer."""
    return sum(size for name, size in result.parameters.items() if layer_of(name) == layer)


def layer_rows(result: SpectrumResult) -> list[dict[str, Any]]:
    """Return one row per layer, for quantization and pruning: trace per parameter and lambda_max of its diagonal block.

    Args:
        result: A spectrum with diagonal blocks.

    Returns:
        Rows with the columns operator, layer, parameters, weight_norm, lambda_max and trace, each of the last two with
        its errors, and trace_per_parameter. A number that is not known is NaN. A standard error over the data that is
        only known from below is in the column that ends in data_stderr_least.
    """
    rows = []
    for layer, block in result.blocks.items():
        count = layer_size(result, layer)
        top = block.eigenvalues[0]
        rows.append(
            {
                "operator": result.main[0],
                "layer": layer,
                "parameters": count,
                "weight_norm": math.hypot(
                    *(norm for name, norm in result.weight_norms.items() if layer_of(name) == layer)
                ),
                "lambda_max": top.value,
                "lambda_max_residual": top.residual,
                **_data_error("lambda_max", top),
                **_trace_columns(block.trace),
                "trace_per_parameter": block.trace.estimate / count if block.trace else math.nan,
            }
        )
    return rows


def step_rows(result: SpectrumResult) -> list[dict[str, Any]]:
    """Return one row per time step: the loss of its outputs and the trace of the GGN of that loss, with its errors."""
    return [
        {
            "step": s.step,
            "loss": s.loss,
            **_trace_columns(s.trace),
        }
        for s in result.steps
    ]


def _trace_columns(trace: Trace | None) -> dict[str, float]:
    trace = trace or Trace(math.nan, math.nan, (math.nan, math.nan), 0, math.nan)
    low, high = trace.ci95
    columns = {"trace": trace.estimate, "trace_stderr": trace.stderr, "trace_low": low, "trace_high": high}
    return columns | _data_error("trace", trace)


def _data_error(name: str, value: Eigenvalue | Trace) -> dict[str, float]:
    return {f"{name}_data_stderr": value.data_stderr, f"{name}_data_stderr_least": value.data_stderr_least}
