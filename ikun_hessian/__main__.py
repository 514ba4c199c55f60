"""`python -m ikun_hessian`, also under torchrun -m."""

from ikun_hessian.cli.main import main

main()
