"""Which options of ``fasttrain train`` cannot work, alone or together; said before anything is started."""

from __future__ import annotations

import math

from fasttrain.train.config import PROFILED, BadInput, TrainConfig, usable_processors


def check(config: TrainConfig, here: int | None = None) -> None:
    """Refuse what cannot work. Imports torch only where the answer depends on it.

    Args:
        here: how many of the processes are on this machine; None: all.

    Raises:
        BadInput: names the option, what it was, and what to do.
    """
    for name in ("steps", "batch", "sequence", "layers", "width", "heads", "ngrams", "rows", "processes", "threads",
                 "accumulate", "log_every", "validate_every", "max_skips", "keep", "tensor", "pipeline", "stages",
                 "expert", "context", "top_k"):
        if getattr(config, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    for name in ("lr", "weight_decay", "clip", "warmup", "seed", "max_restarts", "patience", "save_every",
                 "spikes", "z_loss"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be finite and not negative")
    if config.schedule is not None:
        _check_schedule(config, config.schedule)
    if config.spikes and not config.save_every:
        raise BadInput(f"--spikes {config.spikes} with --save-every 0: there would be no checkpoint to go back to")
    if config.rise > config.steps:
        raise BadInput(f"--steps {config.steps} is shorter than --warmup {config.warmup}: the run would end in its "
                       f"warmup; use a warmup of at most {config.steps} steps, or a longer run")
    if config.seed >= 1 << 63:
        raise BadInput(f"--seed {config.seed}: must be below 2**63")
    if not 0 < config.held_out < 1:
        raise BadInput(f"--held-out {config.held_out}: must be a share between 0 and 1")
    if not 0 <= config.label_smoothing < 1:
        raise BadInput(f"--label-smoothing {config.label_smoothing}: must be a share, at least 0 and less than 1")
    if config.tokens is not None:
        _check_tokens(config)
    if config.sequence < 2:
        raise BadInput(f"--sequence {config.sequence}: must be at least 2, for there to be something to predict from")
    _check_model(config)
    if config.recompute is not None and config.recompute not in ("full", "selective") and not (
            config.recompute.isdecimal() and int(config.recompute) > 0):
        raise BadInput(f"--recompute {config.recompute}: it is full, selective, or every how many blocks")
    if config.profile and config.steps < PROFILED:
        raise BadInput(f"--profile with --steps {config.steps}: it records steps 11 to {PROFILED}; use more steps")
    ours = not config.optimizer.startswith("torch.")
    if config.precision not in ("fp32", "bf16") and not ours:
        raise BadInput(f"--precision {config.precision} with --optimizer {config.optimizer}: it needs loss scales or "
                       f"masters, which torch's has not; use {config.optimizer.removeprefix('torch.')}")
    if config.ema is not None and not ours:
        raise BadInput(f"--ema with --optimizer {config.optimizer}: torch's keeps no average; use "
                       f"{config.optimizer.removeprefix('torch.')}")
    if config.ema is not None and not 0 < config.ema < 1:
        raise BadInput(f"--ema {config.ema}: a decay lies between 0 and 1, like 0.999")
    _check_mesh(config)
    _check_processes(config, config.processes if here is None else here)


def _check_tokens(config: TrainConfig) -> None:
    if config.text is not None:
        raise BadInput(f"--text {config.text} with --tokens {config.tokens}: a run reads text or tokens; leave one out")
    if config.held_out != type(config).held_out:
        raise BadInput(f"--held-out {config.held_out} with --tokens {config.tokens}: what is held out was chosen when "
                       f"the tokens were made; leave it out, or give it to fasttrain tokenize")


def _check_schedule(config: TrainConfig, given: str) -> None:
    from fasttrain.schedules import parse

    if config.warmup is not None:
        raise BadInput(f"--schedule {given!r} with --warmup {config.warmup}: say the warmup in the schedule, as "
                       f"warmup({config.warmup}) + ...")
    try:
        parse(given).check(config.steps)
    except ValueError as error:
        raise BadInput(f"--schedule: {error}") from error


def _check_model(config: TrainConfig) -> None:
    if config.width % (2 * config.heads):
        raise BadInput(
            f"--width {config.width} with --heads {config.heads}: each head needs an even number of features; "
            f"use a width that is a multiple of {2 * config.heads}"
        )
    if config.kv_heads is not None and (config.kv_heads < 1 or config.heads % config.kv_heads):
        raise BadInput(f"--kv-heads {config.kv_heads} with --heads {config.heads}: each must serve as many heads; use "
                       f"a divisor of {config.heads}")
    if config.experts < 0 or (config.experts and config.top_k > config.experts):
        raise BadInput(f"--top-k {config.top_k} with --experts {config.experts}: a position cannot use more experts "
                       "than there are")
    if config.experts and config.gated:
        raise BadInput("--gated with --experts: experts have gates already; leave --gated out")


def _check_mesh(config: TrainConfig) -> None:
    axes = {"tensor": config.tensor, "pipeline": config.pipeline, "expert": config.expert, "context": config.context,
            "copies": config.copies or 1}
    product, told = math.prod(axes.values()), " ".join(f"--{axis} {size}" for axis, size in axes.items() if size > 1)
    if config.processes % product:
        raise BadInput(f"{told} with --processes {config.processes}: together they take {product}; use a multiple of "
                       "that many processes")
    if config.copies is not None and (config.copies < 1 or config.zero != 3):
        raise BadInput(f"--copies {config.copies} with --zero {config.zero}: only a model that is sharded by --zero 3 "
                       "has copies of its shards; leave it out")
    alike = (config.copies or 1) * config.expert * config.context
    if config.zero == 3 and config.axes["shard"] == 1 < alike:
        raise BadInput(f"--zero 3 with {told} and --processes {config.processes}: none are left to divide the "
                       f"parameters; use a larger multiple of {product} processes, or --zero 2")
    heads = config.kv_heads or config.heads
    if heads % config.tensor:
        which, option = (" of keys", "kv-heads") if config.kv_heads else ("", "heads")
        raise BadInput(f"--tensor {config.tensor} with {heads} heads{which}: each process needs whole heads; use a "
                       f"divisor of {heads}, or a multiple of {config.tensor} for --{option}")
    if config.tensor > 1:
        _check_feed(config)
    if config.sequence_parallel and config.tensor == 1:
        raise BadInput("--sequence-parallel without --tensor: it is the processes of --tensor that divide positions")
    if config.sequence_parallel and config.sequence // config.context % config.tensor:
        raise BadInput(f"--sequence-parallel with --sequence {config.sequence} on {config.tensor} processes of "
                       f"--tensor: use a multiple of {config.tensor * config.context}")
    if config.sequence % (2 * config.context if config.context > 1 else 1):
        raise BadInput(f"--context {config.context} with --sequence {config.sequence}: each process has two pieces of "
                       f"a sequence, an early and a late one; use a multiple of {2 * config.context}")
    if config.expert > 1 and (not config.experts or config.experts % config.expert):
        raise BadInput(f"--expert {config.expert} with --experts {config.experts}: each process needs as many experts; "
                       f"use a multiple of {config.expert}")
    _check_pipeline(config)
    if config.model_parallel and config.optimizer.startswith("torch."):
        raise BadInput(f"--optimizer {config.optimizer} with {told}: torch's cannot step parameters of which a process "
                       f"has a part beside whole ones; use {config.optimizer.removeprefix('torch.')}")


def _check_feed(config: TrainConfig) -> None:
    from fasttrain.train.model import feed_width

    hidden = feed_width(config.width, config.gated or config.experts > 0)
    if hidden % config.tensor:
        whose = "--experts" if config.experts else "--gated"
        raise BadInput(f"--tensor {config.tensor} with --width {config.width} and {whose}: the {hidden} features "
                       "within a feed-forward part do not divide; use another --tensor, or for --width a "
                       f"multiple of {24 * config.tensor}")


def _check_pipeline(config: TrainConfig) -> None:
    stages, parts = config.pipeline * config.stages, config.layers + 2
    if config.stages > 1 and config.pipeline == 1:
        raise BadInput(f"--stages {config.stages} without --pipeline: there is one process to have them")
    if config.pipeline == 1:
        return
    if stages > parts:
        raise BadInput(f"--pipeline {config.pipeline} with --stages {config.stages} and --layers {config.layers}: "
                       f"{stages} stages, and {parts} parts (the embedding, the blocks, the head) to divide; use more "
                       "layers or fewer stages")
    several = config.pipeline_schedule in ("interleaved", "zero-bubble", "zbv")
    if several != (config.stages > 1) or (config.pipeline_schedule == "zbv" and config.stages != 2):
        wanted = "--stages 2" if several else "--stages 1"
        raise BadInput(f"--pipeline-schedule {config.pipeline_schedule} with --stages {config.stages}: use {wanted}, "
                       "or another schedule")
    if config.recompute == "selective" and config.pipeline_schedule in ("zero-bubble", "zbv"):
        raise BadInput(f"--recompute selective with --pipeline-schedule {config.pipeline_schedule}: its backward "
                       "passes come in two, and torch computes again for one; use --recompute full, or interleaved")
    if config.accumulate < config.pipeline:
        raise BadInput(f"--accumulate {config.accumulate} with --pipeline {config.pipeline}: it is the number of "
                       f"micro-batches, of which every stage needs one; use {config.pipeline} or more")


def _check_processes(config: TrainConfig, here: int) -> None:
    replicas, which = config.replicas, "processes"
    if config.model_parallel:
        which = "processes that read different sequences"
    if config.batch % replicas:
        raise BadInput(
            f"--processes {config.processes} with --batch {config.batch}: a step must give every process the same "
            f"number of sequences; use a batch that is a multiple of {replicas} ({which})"
        )
    if config.batch // replicas % config.accumulate:
        raise BadInput(
            f"--accumulate {config.accumulate} with --batch {config.batch} on {replicas} {which}: every "
            f"backward pass must have the same number of sequences; use a batch that is a multiple of "
            f"{replicas * config.accumulate}"
        )
    if config.zero and config.wire == "int8":
        raise BadInput("--zero with --wire int8: shards of gradients do not travel in 8 bits; use bf16")
    if config.zero == 3 and config.wire == "ordered":
        raise BadInput("--zero 3 with --wire ordered: the order of a sharded model's sums is its backend's; use "
                       "--zero 2, or --wire same")
    if config.device == "cpu":
        places, kind = usable_processors(), "processor"
        if config.threads > places:
            raise BadInput(f"--threads {config.threads} on {places} processors: use at most {places}")
        most = max(2, places)  # two share a single processor, so that the default runs everywhere
        if config.model_parallel:
            most *= 4  # they compute in turns, to be tried before GPUs are there
    else:
        import torch

        most = places = torch.cuda.device_count()
        kind = "GPU"
        if places == 0:
            raise BadInput("--device cuda: this torch finds no GPU; use --device cpu")
    if here > most:
        raise BadInput(
            f"--processes {here} on {places} {kind}{'s' if places > 1 else ''}: they would only wait for each "
            f"other; use at most {most}"
        )
