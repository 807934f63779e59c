"""Parts of the training floor in a loop of your own: one process, your model, your text. Runs in a few seconds.

    python examples/own_loop.py [FILE]
"""

import sys
from pathlib import Path

import torch
from torch import nn

from fasttrain.data import Windows
from fasttrain.optim import AdamW
from fasttrain.schedules import Scheduler, warmup_cosine
from fasttrain.train import text
from fasttrain.train.clock import PhaseClock

STEPS, BATCH, LENGTH, PEAK = 200, 16, 32, 1e-2


class NextByte(nn.Module):
    """Your model: a recurrent network over bytes."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, bytes_BT: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(self.embedding(bytes_BT))[0])


torch.manual_seed(0)
torch.set_num_threads(2)
read = text.load(Path(sys.argv[1]) if len(sys.argv) > 1 else None, held_out=0.05, sequence=LENGTH)
windows = Windows(read.train, LENGTH, seed=0)  # sample i is a pure function of (seed, i): resume with one integer
model = NextByte()
optimizer = AdamW(model.parameters(), lr=PEAK)
scheduler = Scheduler(optimizer, lr=warmup_cosine(STEPS, warmup=20))
clock = PhaseClock(torch.device("cpu"))

for step in range(STEPS):
    with clock("data"):
        batch = torch.from_numpy(windows.batch(step * BATCH, BATCH)).long()
    with clock("forward and backward"):
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
    with clock("optimizer"):
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if step % 40 == 39:
        spent = clock.take()
        shares = ", ".join(f"{phase} {seconds / sum(spent.values()):.0%}" for phase, seconds in spent.items())
        print(f"step {step + 1}: loss {loss.item():.3f}; {shares}")
