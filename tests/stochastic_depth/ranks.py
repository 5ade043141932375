"""Two ranks with generators of their own draw a mask together and, without ``sync``, apart; prints what each drew."""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from effkern.nn import StochasticBlock, StochasticDepth, stochastic_depth
from effkern.nn.residual import ResidualBlock


def masks(rank: int) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    x, lines = torch.zeros(24, 1), []
    for sync in (True, False):
        for mode in ("batch", "row", "subset"):
            drawn = [stochastic_depth(x, lambda v: v + 1, 0.5, mode=mode, sync=sync) for _ in range(8)]
            layer = StochasticDepth(torch.nn.Identity(), 0.5, mode, sync=sync)
            drawn += [layer(x + 1) - 1 for _ in range(8)]
            block = StochasticBlock.from_block(ResidualBlock(1, 1), 0.5, mode, sync=sync).eval()
            block.training = True  # draws; its batch norm stays as it is
            torch.nn.init.ones_(block.bn2.bias)
            torch.nn.init.zeros_(block.bn2.weight)
            drawn += [block(torch.zeros(24, 1, 1, 1)).detach().flatten(1) for _ in range(8)]
            lines.append(" ".join("".join(str(int(v)) for v in one.flatten()) for one in drawn))
    dist.barrier()
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    rank = int(os.fork() == 0)
    Path(sys.argv[1], f"{rank}.txt").write_text(masks(rank))
    if rank:
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
