"""BlockDrop: learn by policy gradient which residual blocks each image needs (CVPR 2018, arXiv 1711.08393).

Any network serves as the backbone that has

* ``num_blocks``: K, the number of blocks under the policy's control,
* ``forward(x, keep)`` with ``keep`` ``[N, K]``: 1 runs the block, 0 takes its shortcut.

If it also has ``stem(x)``, ``body(x, keep, start, stop)`` and ``head(x)``, training shares the part that the curriculum
forces on. :class:`effkern.models.resnet.ResNet` and what :func:`effkern.nn.skip_form` makes of it have all of that.
"""

from effkern.blockdrop.curriculum import Curriculum
from effkern.blockdrop.loss import entropy, leave_one_out, log_probability, policy_loss, reward
from effkern.blockdrop.method import JointTraining, PolicyTraining
from effkern.blockdrop.network import Backbone, BlockDropNet
from effkern.blockdrop.policy import PolicyNet, bound, greedy, sample
from effkern.blockdrop.train import Finetune, PolicyGradient, Usage, evaluate

__all__ = [
    "Backbone",
    "BlockDropNet",
    "Curriculum",
    "Finetune",
    "JointTraining",
    "PolicyGradient",
    "PolicyNet",
    "PolicyTraining",
    "Usage",
    "bound",
    "entropy",
    "evaluate",
    "greedy",
    "leave_one_out",
    "log_probability",
    "policy_loss",
    "reward",
    "sample",
]
