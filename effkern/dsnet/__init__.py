"""Dynamic-width (slimmable) networks: training by the sandwich rule, calibration of batch norm, cost of every width.

Works on any module called as ``model(x, width)``, with ``width`` an index and, in eval mode, an index tensor. Gates,
which choose every image's width, need a network in segments: see :class:`Routed`.
"""

from effkern.dsnet.budget import meet_budget
from effkern.dsnet.calibrate import all_ways, calibrate, uncalibrated
from effkern.dsnet.cost import AtWidth, mac_table
from effkern.dsnet.extract import extract
from effkern.dsnet.gate_loss import GateCrossEntropy, expected_right, gumbel_noise, gumbel_softmax, sgs_targets
from effkern.dsnet.gating import GateTraining
from effkern.dsnet.method import SupernetTraining, soft_cross_entropy
from effkern.dsnet.route import Dynamic, Routed, expected_cost, route_costs
from effkern.dsnet.routing import Routing, evaluate_routing
from effkern.dsnet.sandwich import SandwichRule, sandwich_backward

__all__ = [
    "AtWidth",
    "Dynamic",
    "GateCrossEntropy",
    "GateTraining",
    "Routed",
    "Routing",
    "SandwichRule",
    "SupernetTraining",
    "all_ways",
    "calibrate",
    "evaluate_routing",
    "expected_cost",
    "expected_right",
    "extract",
    "gumbel_noise",
    "gumbel_softmax",
    "mac_table",
    "meet_budget",
    "route_costs",
    "sandwich_backward",
    "sgs_targets",
    "soft_cross_entropy",
    "uncalibrated",
]
