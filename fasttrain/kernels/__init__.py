"""Backends that run a `fasttrain.rule.Rule` over many tensors. They know rules, and no optimizer."""
