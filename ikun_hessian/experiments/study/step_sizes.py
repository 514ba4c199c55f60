"""Check that the analyses of a study fit the parameters of its networks, before hours of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ikun_hessian.experiments.study.preset import PresetError
from ikun_hessian.experiments.study.unit import Step


def check_sizes(where: str, sizes: Mapping[str, int], steps: Sequence[Step]) -> None:
    """Check the parameters, the surrogate and the number of eigenpairs of every analysis.

    Args:
        where: Start of a message: the file, and the run if there are several networks.
        sizes: Number of elements of every parameter, by name.
        steps: The analyses.

    Raises:
        PresetError: If an analysis is impossible.
    """
    from hessian_tools.analysis.planning.memory import budget
    from ikun.surrogates import Surrogate

    for step in steps:
        patterns = [pattern.strip() for pattern in step.opening["params"].split(",")]
        size = sum(n for key, n in sizes.items() if any(fnmatchcase(key, pattern) for pattern in patterns))
        try:
            if not size:
                raise ValueError(f"params: nothing matches '{step.opening['params']}': choose from {', '.join(sizes)}")
            if step.opening["surrogate"]:
                Surrogate.parse(step.opening["surrogate"])
            if step.command == "spectrum":
                pairs = max(step.settings.magnitude or step.settings.top, step.settings.scaled)
                if pairs > size:
                    raise ValueError(f"{pairs} eigenvalues are more than the {size} parameters: ask for fewer")
                budget(step.settings.memory * 2**30, size, pairs)
        except ValueError as error:
            raise PresetError(f"{where}: [{step.command}] {error}") from None
