"""Proof on a GPU, in one command: ``python -m benchmarks gpu`` (docs/gpu.md).

    command     the parts one after the other, each within its share of the time; the table; the JSON file
    processes   a command as a process of its own, ended at its limit
    machine     what GPU, driver and packages are here, or why none can be used
    sanitize    small steps, norms and packs, to be run under compute-sanitizer
    worker      the works, in a process that the command starts again if one of them brings it down
    bench       what a work is given: device, sizes, timing of rivals in turn
    peers       other packages' optimizers that can be imported
    shapes      models as lists of shapes
    table       the rows of the README, and the short table

The rest is one file for each kind of work: ceiling, recipes, small, host, ema, muon, offload, start, buckets,
end_to_end.
"""
