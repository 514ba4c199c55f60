"""Run Python on the pretend device: python -m pretend_device (-m MODULE | -c CODE | SCRIPT) [ARGUMENTS]."""

from __future__ import annotations

import os
import runpy
import sys

from pretend_device import kernels
from pretend_device.device import pretend_device


def main() -> None:
    kind, *arguments = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    with pretend_device():
        for where, name, value in kernels.replaced(interpret=False):
            setattr(where, name, value)
        if kind == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [kind, *arguments]
            runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
