"""Two ranks of one run, as torchrun starts them but from one import of torch: without batch norm, then with."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small import RECIPE, Noisy, go, network


def rank(folder: Path) -> None:
    for norm in (False, True):
        method = Noisy(network(norm=norm, dropout=False))
        go(folder / f"norm-{norm}", method, replace(RECIPE, accumulate=1, ema=0.0))
    one_step = replace(RECIPE, epochs=0.25, accumulate=1, ema=0.0)
    go(folder / "step", Noisy(network(dropout=False)), one_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    if os.fork() == 0:
        os.environ["RANK"] = "1"
        rank(Path(sys.argv[1]))
        os._exit(0)
    os.environ["RANK"] = "0"
    rank(Path(sys.argv[1]))
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
