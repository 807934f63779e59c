"""What a training would take on so many GPUs, for each way of dividing it: memory, bytes on links, waiting, time.

The command is `fasttrain plan`; in Python, `fasttrain.plan.planning.plan`. Formulas and sources: docs/plan.md.
"""
