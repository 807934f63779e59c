"""Guards: what looks at a run, decides, and leaves it to the loop to act. Each works alone.

`update` takes numbers of the host and returns a small decision; states are JSON values. No step waits for a device:
`Later` brings its numbers to the host one step late.
"""

from fasttrain.guards.averages import ema
from fasttrain.guards.bad_steps import NonFinite, nonfinite
from fasttrain.guards.decay import decay_groups
from fasttrain.guards.judged import Judged, TooManyBadSteps
from fasttrain.guards.later import Arrived, Later
from fasttrain.guards.noise import GradientSquares, NoiseScale, UpdateRatios, square_norm
from fasttrain.guards.spikes import LossSpikes, SpikeDecision
from fasttrain.guards.stopping import Best, EarlyStopping, Gap

__all__ = ["Arrived", "Best", "EarlyStopping", "Gap", "GradientSquares", "Judged", "Later", "LossSpikes", "NoiseScale",
           "NonFinite", "SpikeDecision", "TooManyBadSteps", "UpdateRatios", "decay_groups", "ema", "nonfinite",
           "square_norm"]
