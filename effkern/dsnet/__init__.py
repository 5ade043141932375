"""Dynamic-width (slimmable) networks: training by the sandwich rule, calibration of batch norm, cost of every width.

Works on any module called as ``model(x, width)``, with ``width`` an index and, in eval mode, an index tensor.
"""

from effkern.dsnet.calibrate import calibrate, uncalibrated
from effkern.dsnet.cost import AtWidth, mac_table
from effkern.dsnet.method import SupernetTraining, soft_cross_entropy
from effkern.dsnet.sandwich import SandwichRule, sandwich_backward

__all__ = [
    "AtWidth",
    "SandwichRule",
    "SupernetTraining",
    "calibrate",
    "mac_table",
    "sandwich_backward",
    "soft_cross_entropy",
    "uncalibrated",
]
