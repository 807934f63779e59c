"""A small transformer of your own, divided in any way over the processes that torchrun starts. Some seconds on a CPU.

    torchrun --standalone --nproc-per-node=4 examples/model_parallel.py --tensor 2 --pipeline 2 --out runs/divided
"""

import argparse

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fasttrain.checkpoint import Checkpointer
from fasttrain.data import Loader, Windows
from fasttrain.losses import cross_entropy
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Mesh, Zero, shard, tensor_parallel
from fasttrain.parallel.building import Normal, materialize
from fasttrain.parallel.pipeline import Pipeline, split
from fasttrain.schedules import Scheduler, warmup_cosine
from fasttrain.train.blocks import recompute
from fasttrain.train.fit import fit

WIDTH, HEADS, LENGTH, BATCH, MICRO = 32, 4, 32, 16, 2
PLAN = {"0.tokens": "vocabulary", "0.places": "replicate", "*.norm*": "sequence", "*.[qkv]": "column", "*.out": "row",
        "*.up": "column", "*.down": "row", "*.logits": "vocabulary"}


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, x):
        return self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device)[None])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm_up = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm(x)                                    # -1: a rank has some of the heads
        q, k, v = (f(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_up(x))))


class Head(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.logits.weight = tied

    def forward(self, x):
        return self.logits(self.norm(x))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis in ("tensor", "pipeline", "shard"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2), help="of the other processes; --shard is 3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out")
    args = parser.parse_args(argv)

    if not dist.is_initialized():
        dist.init_process_group("gloo")                     # on GPUs: "nccl", after torch.cuda.set_device(LOCAL_RANK)
    mesh = Mesh(tensor=args.tensor, pipeline=args.pipeline, shard=args.shard)          # data: what is left of the world
    with torch.device("meta"):                              # shapes, no memory
        embedding = Embedding()
        model = nn.Sequential(embedding, *(Block() for _ in range(4)), Head(embedding.tokens.weight))
    tensor_parallel(model, mesh, PLAN, sequence=True)
    split(model, mesh)
    materialize(model, seed=0, rules={"0.*": Normal(0.02)})
    blocks = [part for part in model if isinstance(part, Block)]
    recompute(model, blocks=blocks)
    divided = shard(model, mesh, blocks=blocks) if args.shard > 1 else DataParallel(model, mesh=mesh)
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    if args.zero:
        optimizer = Zero(divided, AdamW, stage=args.zero, lr=1e-2)
    pipeline = Pipeline(divided, mesh, cross_entropy, micro_batches=MICRO) if args.pipeline > 1 else None

    def loss(called, batch):                                # a pipeline has its own loss, and wants inputs and targets
        tokens = batch["tokens"].long()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return (inputs, targets) if pipeline else cross_entropy(called(inputs), targets)

    records = []                                            # the same on every rank
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 100, dtype=np.uint8)
    checkpoints = Checkpointer(args.out, mesh=mesh, every=20) if args.out else None
    with Loader(Windows(text, LENGTH), BATCH, seed=0, rank=mesh.replica, world=mesh.replicas) as data:
        fit(divided, data, optimizer, loss, steps=args.steps, accumulate=MICRO, pipeline=pipeline, clip=1.0,
            schedule=Scheduler(optimizer, lr=warmup_cosine(1000, warmup=5)), checkpoints=checkpoints, log_every=5,
            callbacks=[records.append])
    if checkpoints:
        checkpoints.close()
    if mesh.rank == 0:
        print(mesh, *(f"step {record['step']}: {record.get('text') or record['loss']}" for record in records), sep="\n")
    return records


if __name__ == "__main__":
    main()
