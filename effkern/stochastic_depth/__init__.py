"""Stochastic depth: train a residual network with a random part of its blocks in each step (arXiv 1603.09382).

    network = convert(network, survival_schedule(network.num_blocks, last=0.5))     # same parameters, same names
    train(StochasticDepthTraining(network), feed, recipe)
    fast = effkern.nn.skip_form(deploy(network))                                    # plain again, nothing to scale

The layer itself, for any branch, is :class:`effkern.nn.StochasticDepth`.
"""

from effkern.stochastic_depth.convert import blocks_of, convert, deploy
from effkern.stochastic_depth.schedule import expected_depth, survival_schedule
from effkern.stochastic_depth.train import StochasticDepthTraining

__all__ = ["StochasticDepthTraining", "blocks_of", "convert", "deploy", "expected_depth", "survival_schedule"]
