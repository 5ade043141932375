"""Kills a run at random moments until it is through, and prints how often.

A program of its own, because it forks: one import of torch serves all starts.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small import go


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*.safetensors"))


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    go(folder / "whole")
    killed, moments = folder / "killed", random.Random(seed)
    for kills in range(200):
        child = os.fork()
        if child == 0:
            try:
                go(killed)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        # A few checkpoints further, wherever in a step it then is.
        begin, status = checkpoints(killed)[-1:], None
        for _ in range(moments.randrange(4)):
            while status is None and checkpoints(killed)[-1:] == begin:
                time.sleep(0.0005)
                done, status = os.waitpid(child, os.WNOHANG)
                status = status if done else None
            begin = checkpoints(killed)[-1:]
        if status is None:
            time.sleep(moments.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(f"killed {kills} times" if os.WEXITSTATUS(status) == 0 else "a start failed")
            return
    print("never got through")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
