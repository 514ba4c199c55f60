"""Curvature at several epochs of a training loop.

The script trains a spiking network of `ikun` on scikit-learn's digits in a custom loop. Every few epochs it measures
the largest eigenvalue and the trace of the Gauss-Newton matrix, and the smallest eigenvalue of the surrogate Hessian.
`make_objective` copies the model, so measuring does not change the training.
"""

from __future__ import annotations

import torch

from hessian_tools import eigenpairs, ggn, hessian, make_objective, trace
from ikun import Network, Spec, initialize, load_dataset, mean_square


def main(epochs: int = 6, every: int = 2) -> None:
    data = load_dataset("digits", subset=512)
    x, y = data.images[:], data.labels
    torch.manual_seed(0)
    network = Network(Spec(model="csnn", channels=4, timesteps=4))
    initialize(network, "kaiming", generator=torch.Generator().manual_seed(0), x=x)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)

    print("epoch     loss  GGN lambda_max  GGN trace  Hessian lambda_min")
    for epoch in range(epochs + 1):
        if epoch % every == 0:
            objective = make_objective(network, mean_square, (x[:256], y[:256]), batch_size=128)
            random = torch.Generator().manual_seed(0)
            gauss_newton = ggn(objective)
            top = eigenpairs(gauss_newton, largest=3, generator=random)
            total = trace(gauss_newton, probes=8, generator=random, deflate=top)
            low = eigenpairs(hessian(objective), smallest=1, generator=random)
            loss = objective.value_and_gradient()[0]
            print(f"{epoch:5d}  {loss:7.4f}  {top.values[0]:14.4f}  {total.estimate:9.3f}  {low.values[-1]:18.4f}")
        network.train()
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            mean_square(network(x[part]), y[part]).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
