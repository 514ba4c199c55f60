"""`python -m ikun_hessian`, also under torchrun -m."""

from ikun_hessian.main import main

main()
