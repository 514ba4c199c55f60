"""The application makes MKL reproducible before torch is loaded, and results say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def printed(code: str, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


SHOW = "import os; print(os.environ.get('MKL_CBWR'), 'torch' in sys.modules)"


@pytest.mark.parametrize("door", ["ikun_hessian", "cli", "ikun_hessian.cli.main"])
def test_every_door_sets_the_variable_before_torch_is_loaded(door: str) -> None:
    assert printed(f"import sys, {door}; {SHOW}") == "AUTO False"


def test_the_users_own_value_is_kept() -> None:
    assert printed(f"import sys, ikun_hessian; {SHOW}", MKL_CBWR="COMPATIBLE") == "COMPATIBLE False"


def test_nothing_is_claimed_once_torch_is_loaded() -> None:
    assert printed(f"import sys, torch, ikun_hessian; {SHOW}") == "None True"


def test_the_versions_of_a_result_record_it() -> None:
    code = "from hessian_tools import versions; print(versions().get('MKL_CBWR'))"
    assert printed(code) == "None"
    assert printed(f"import ikun_hessian; {code}") == "AUTO"
