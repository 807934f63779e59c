"""An optimizer of your own: two lines of arithmetic become a fused kernel on every backend."""
import torch

from fasttrain.optim import Optimizer
from fasttrain.rule import sqrt


class MyOptimizer(Optimizer):
    state = ("square_avg",)

    @staticmethod
    def coefficients(step, lr, beta, eps):  # what does not depend on the element, in double precision
        return dict(keep=beta, add=1 - beta, rate=lr * sqrt(1 - beta**step), eps=eps)

    @staticmethod
    def element(p, g, square_avg, k):  # what does
        square_avg = k.keep * square_avg + k.add * g * g
        return p - k.rate * (g / (sqrt(square_avg) + k.eps)), square_avg

    def __init__(self, params, lr=1e-3, beta=0.99, eps=1e-8, **options):
        super().__init__(params, dict(lr=lr, beta=beta, eps=eps), **options)

model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
optimizer, x = MyOptimizer(model.parameters(), lr=2e-2), torch.randn(512, 8)
for _ in range(30):
    optimizer.zero_grad()
    loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.4f}")
