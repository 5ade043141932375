"""BlockDrop: learn by policy gradient which residual blocks each image needs (CVPR 2018, arXiv 1711.08393).

Any network serves as the backbone that has

* ``num_blocks``: K, the number of blocks under the policy's control,
* ``forward(x, keep)`` with ``keep`` ``[N, K]``: 1 runs the block, 0 takes its shortcut.

If it also has ``stem(x)``, ``body(x, keep, start, stop)`` and ``head(x)``, training shares the part that the curriculum
forces on. :class:`effkern.models.resnet.ResNet` and what :func:`effkern.nn.skip_form` makes of it have all of that.
"""

from effkern.blockdrop.analysis import accuracy_by_blocks, easiest_and_hardest, summary, unique_policies
from effkern.blockdrop.baselines import best_static, best_statics, first_blocks, fixed_policy, random_policy
from effkern.blockdrop.cost import block_costs
from effkern.blockdrop.curriculum import Curriculum
from effkern.blockdrop.loss import credit_of, entropy, leave_one_out, log_probability, policy_loss, reward
from effkern.blockdrop.method import JointTraining, PolicyTraining
from effkern.blockdrop.network import Backbone, BlockDropNet, by_pattern
from effkern.blockdrop.policy import PolicyNet, bound, greedy, load_first_blocks, sample
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
    "accuracy_by_blocks",
    "best_static",
    "best_statics",
    "block_costs",
    "bound",
    "by_pattern",
    "credit_of",
    "easiest_and_hardest",
    "entropy",
    "evaluate",
    "first_blocks",
    "fixed_policy",
    "greedy",
    "leave_one_out",
    "load_first_blocks",
    "log_probability",
    "policy_loss",
    "random_policy",
    "reward",
    "sample",
    "summary",
    "unique_policies",
]
