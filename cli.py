"""The command line from the working tree: `python cli.py` is `ikun-hessian`, all of it in the package ikun_hessian."""

from ikun_hessian.cli.main import cli, main, run

__all__ = ["cli", "main", "run"]

if __name__ == "__main__":
    main()
