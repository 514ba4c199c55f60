"""Tests of the number of probes of a trace."""

import torch
from torch import nn

from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian


def test_a_trace_has_no_more_probes_than_its_error_from_the_data_needs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 60), nn.Tanh(), nn.Linear(60, 5)).double()
    x, y = 3 * torch.randn(200, 8, dtype=torch.float64), torch.randint(5, (200,))
    o = make_objective(net, nn.functional.cross_entropy, (x, y))
    settings = SpectrumSettings(top=3, smallest=2, trace_probes=400, exact=False)
    probes = {}
    for name, s in spectrum(o, settings).spectra.items():
        error = max(e for e in (s.trace.data_stderr, s.trace.data_stderr_least) if e == e)
        assert 12 <= s.trace.probes <= 400
        assert s.trace.probes == 400 or s.trace.stderr < 0.6 * error  # 0.3 up to the chance in few probes
        exact = float(dense({"hessian": hessian, "ggn": ggn}[name](o)).trace())
        assert abs(s.trace.estimate - exact) < 5 * s.trace.stderr
        probes[name] = s.trace.probes
    assert probes["hessian"] < 300
