"""The parallel floor: how one training step is divided over processes."""
