"""Iterations that end sample by sample: each is kept as it was when it met the tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

from invrecon.methods.base import Stats, per_sample


class PerSampleStop:
    """Watches an iteration on a batch; whatever shares the batch, a sample's result is its own.

    Attributes:
        result: Every sample at its stop; at the last watched iteration, if it has not stopped.
        measure: What was compared with the tolerance, `(B,)`.
        iterations: The iteration at which each sample stopped, `(B,)`.
        done: Which samples have stopped, `(B,)`.

    Args:
        x: Images `(B, C, *S)`, the result before any iteration.
        tol: A sample stops when its measure is at most `tol`; 0 never stops one that still moves.
    """

    def __init__(self, x: Tensor, tol: float) -> None:
        self.tol = tol
        self.result = x
        self.measure = x.new_full(x.shape[:1], torch.inf, dtype=torch.float64)
        self.iterations = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
        self.done = torch.zeros(x.shape[:1], dtype=torch.bool, device=x.device)

    def __call__(self, iteration: int, x: Tensor, measure: Tensor) -> bool:
        """Takes in an iterate and returns whether all samples have stopped.

        Args:
            iteration: Its number, from 1.
            x: The iterate, `(B, C, *S)`.
            measure: Its distance from the goal, `(B,)`, in the terms of `tol`.
        """
        self.result = torch.where(per_sample(self.done, x), self.result, x)
        self.measure = torch.where(self.done, self.measure, measure.double())
        self.iterations = torch.where(self.done, self.iterations, iteration)
        self.done = self.done | (self.measure <= self.tol)
        return bool(self.done.all())

    def stats(self, name: str) -> Stats:
        """Returns `num_iterations` and the last measure, under its name, of every sample."""
        return {"num_iterations": self.iterations.tolist(), name: self.measure.tolist()}
