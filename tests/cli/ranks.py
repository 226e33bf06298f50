"""Runs command lines on several ranks each: `python ranks.py '[[2, ["predict", ...]], ...]'`.

Lightning is imported once and the ranks are forked: a process that imports it anew costs more than the run. They
find each other by the environment, as processes that a cluster has started do.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import torch

from invrecon.cli import main


def rank_main(rank: int, num_ranks: int, port: int, args: list[str]) -> None:
    """One rank: leaves the process with status 0, or 1 after an error."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))
    try:
        main(args)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def run(num_ranks: int, args: list[str]) -> bool:
    """Forks the ranks and tells whether all of them came to a good end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--trainer.devices={num_ranks}", "--trainer.strategy=ddp"] if num_ranks > 1 else []
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            rank_main(rank, num_ranks, port, [*args, *options])
        children.append(child)
    return all([os.waitpid(child, 0)[1] == 0 for child in children])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.argv, jobs = sys.argv[:1], json.loads(sys.argv[1])
    sys.exit(0 if all([run(num_ranks, args) for num_ranks, args in jobs]) else 1)
