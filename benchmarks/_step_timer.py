"""A Lightning callback that times training steps in turn with plain convolutions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import nn

NUM_IMAGES = 32
SHAPES = {"32 channels, 56^2": (32, 56), "64 channels, 56^2": (64, 56), "64 channels, 28^2": (64, 28),
          "128 channels, 28^2": (128, 28), "128 channels, 14^2": (128, 14)}  # fmt: skip


def plain_convolution(channels: int, side: int, dtype: torch.dtype) -> tuple[float, Callable[[], None]]:
    """Returns the operations of a 3 x 3 convolution, forward and backward, and the function that does them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_IMAGES, channels, side, side, generator=generator).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator).to(dtype, memory_format=torch.channels_last)
    x, weight, cotangent = x.requires_grad_(), weight.requires_grad_(), x.detach().clone()

    def run() -> None:
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), cotangent)

    return 3 * 2.0 * 9 * channels**2 * NUM_IMAGES * side**2, run


class StepTimer(lightning.Callback):
    """Times every step from start to start: data, forward, backward, optimiser and averaged weights.

    Between steps, with the clock stopped, it times plain convolutions, and it counts the operations of the network's
    own convolutions: two a multiply-add, three times those of the forward pass (twice in the first layer, whose input
    needs no gradient).

    Args:
        num_warmup: Steps that do not count.
    """

    def __init__(self, num_warmup: int = 3) -> None:
        self.num_warmup = num_warmup
        self.steps: list[dict[str, float]] = []
        self.plain: dict[str, list[float]] = {name: [] for name in SHAPES}  # operations a second
        self._runs: dict[str, tuple[float, Callable[[], None]]] = {}
        self._open: dict[str, float] | None = None
        self._operations = 0.0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Makes the convolutions and hooks the network's."""
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        self._runs = {name: plain_convolution(*shape, dtype) for name, shape in SHAPES.items()}
        network = pl_module.denoiser.network
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(self._counter(2 if layer is network.stem else 3))

    def _counter(self, passes: int) -> Callable[..., None]:
        def count(layer: nn.Conv2d, inputs: Any, output: torch.Tensor) -> None:
            self._operations += passes * 2.0 * output.numel() * layer.weight[0].numel()

        return count

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_index: int) -> None:
        """Closes the last step, runs the convolutions and opens the next step."""
        now = time.perf_counter()
        if self._open is not None and batch_index > self.num_warmup:
            step = self._open
            seconds = now - step.pop("start")
            self.steps.append({**step, "seconds": seconds, "operations": self._operations})
        for name, (operations, run) in self._runs.items():
            start = time.perf_counter()
            run()
            if batch_index >= self.num_warmup:
                self.plain[name].append(operations / (time.perf_counter() - start))
        self._operations = 0.0
        num, _, side, _ = batch.x.shape
        self._open = {"patch_size": side, "patches": num, "start": time.perf_counter()}
