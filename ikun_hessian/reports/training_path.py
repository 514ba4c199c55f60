"""Print the path of a training run for a terminal of 80 columns."""

from __future__ import annotations

import math

from hessian_tools.results.training_path import TrainingPath
from ikun_hessian.reports.header import opened
from ikun_hessian.reports.text import field, paragraph, shortened, warning


def training_path_lines(r: TrainingPath) -> list[str]:
    """Return the lines that `landscape --trajectory` prints for a result."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in zip(r.directions, r.explained, strict=True))
    lines = [*opened(r), ""]
    lines += field("plane", f"{shares} of the variance of {len(r.snapshots)} snapshots; |w| = {r.weight_norm:.4g}")
    lines += ["", f"{'snapshot':<26}{'epoch':>6}{'s':>10}{'t':>10}{'off':>8}{'loss':>10}{'in plane':>10}"]
    for s in r.snapshots:
        at = "".join(f"{x / r.weight_norm:>10.2g}" for x in s.position)
        name, epoch = shortened(s.name, 25), "-" if s.epoch is None else str(s.epoch)
        losses = f"{s.loss:>10.4g}{s.projected_loss:>10.4g}"
        lines.append(f"{name:<26}{epoch:>6}{at}{s.off_plane / r.weight_norm:>8.1g}{losses}")
    lines += paragraph(
        "s, t: coordinates in the plane through the last snapshot w, in units of |w|. off: distance from the plane, in "
        "the same unit. loss: true loss of the snapshot itself. in plane: true loss at its projection onto the plane."
    )
    for text in path_cautions(r):
        lines += warning(text)
    return [*lines, "", f"cost        {r.evaluations:,} losses on all samples, {r.seconds:.1f} s"]


def path_cautions(r: TrainingPath) -> list[str]:
    """Return warnings: what could not be computed, and which conclusions do not hold."""
    found = [f"No {name}: {why}." for name, why in r.refused.items()]
    if sum(r.explained) < 0.5:
        found.append(
            f"The plane holds only {sum(r.explained):.0%} of the variance: the path is mostly outside of it, and the "
            "loss in the plane is not the loss along the path."
        )
    far = [s for s in r.snapshots if math.isfinite(s.loss) and abs(s.projected_loss - s.loss) > 0.5 * abs(s.loss)]
    if far:
        found.append(
            f"The loss in the plane differs from that of the snapshot by more than half for {len(far)} of "
            f"{len(r.snapshots)} snapshots: the contours do not show what training saw there."
        )
    return found
