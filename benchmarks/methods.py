"""What a method adds to the network: seconds a denoiser evaluation, and the share of them outside the network.

    python -m benchmarks.methods --json methods.json [--methods DDS DPS] [--evaluations 10] [--threads 2]

Every method of the package that needs a prior, by its name, with few levels, on one slice of 256 x 256 from 20 views
(deblurring for methods that need singular values), or on several at once (`--slices 20,35,50,65 --batch-size 4`). A
clock hangs on the network itself, on its forward and its backward passes: all else (cutting patches, operator, data
step, noise) is outside. On a GPU it waits for what came before and in each pass. Contestants take turns. The aim is
less than 10 % outside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import _common, _machine
from benchmarks._common import HELD_OUT, SETTINGS, Bench, Entry, Row
from benchmarks._methods import find_methods, shorten
from benchmarks.claims._problems import PROBLEMS
from invrecon.errors import InputError
from invrecon.methods import Method
from invrecon.rng import make_generators

AIM = 0.10


class NetworkClock:
    """Adds up the seconds that a network spends in its forward and backward passes.

    Args:
        network: The network; hooks are left on it until `remove`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.seconds = 0.0
        self._start = 0.0
        self._hooks = [
            network.register_forward_pre_hook(self._begin),
            network.register_forward_hook(self._end),
            network.register_full_backward_pre_hook(self._begin),
            network.register_full_backward_hook(self._end),
        ]

    def _begin(self, *event: object) -> None:
        _machine.synchronize()
        self._start = time.perf_counter()

    def _end(self, *event: object) -> None:
        _machine.synchronize()
        self.seconds += time.perf_counter() - self._start

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()


class Contestant:
    """A reconstruction without its measurement, with the seconds that each run spent in the network.

    Args:
        bench: Where it runs.
        method: What reconstructs.
        prior: The prior file, or the name of a shipped one.
        batch: The slices.
    """

    def __init__(self, bench: Bench, method: Method, prior: str, batch: _common.CaseBatch) -> None:
        self.setting = PROBLEMS["deblur"] if method.needs_spectrum else SETTINGS["20-clean"]
        task = bench.task(self.setting, Entry("timed", method, prior))
        with torch.no_grad():
            self.y, self.operator, _ = task.measure(batch.to(bench.record.device))
        assert task.prior is not None
        self.method, self.prior, self.ids, self.seed = method, task.prior, batch.id, bench.seed
        self.clock = NetworkClock(task.prior.denoiser.network)  # type: ignore[union-attr]
        self.inside: list[float] = []
        self.num_evaluations = 0.0

    def __call__(self) -> None:
        """Reconstructs."""
        before = self.clock.seconds
        generators = make_generators(self.seed, self.ids)
        estimate = self.method(self.y, self.operator, self.prior, generators=generators)  # type: ignore[arg-type]
        self.inside.append(self.clock.seconds - before)
        counted = estimate.stats["num_evaluations"]
        self.num_evaluations = max(counted) if isinstance(counted, list) else counted


def measure(contestants: dict[str, Contestant], repeats: int) -> list[Row]:
    """Returns a row a method, slowest outside the network first."""
    runs: dict[str, Callable[[], object]] = dict(contestants)
    seconds = _common.interleave(runs, repeats, warmup=0)  # each has run once by now
    rows = []
    for name, own in contestants.items():
        inside = own.inside[-repeats:]  # without the first
        shares = [1 - i / total for i, total in zip(inside, seconds[name], strict=True)]
        rows.append({
            "method": name,
            "problem": own.setting.title,
            "evaluations": own.num_evaluations,
            "seconds_per_evaluation": statistics.median(seconds[name]) / own.num_evaluations,
            "network_seconds_per_evaluation": statistics.median(inside) / own.num_evaluations,
            "outside": statistics.median(shares),
            "passed": statistics.median(shares) < AIM,
            "gradient": own.method.needs_gradient,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["outside"])


def report(rows: list[Row]) -> None:
    """Prints the table."""
    header = ["Method", "Problem", "Evaluations", "Gradient", "s an evaluation", "of it network", "Outside",
              f"under {100 * AIM:.0f} %"]  # fmt: skip
    lines = [
        (row["method"], row["problem"], f"{row['evaluations']:.0f}", "yes" if row["gradient"] else "",
         f"{row['seconds_per_evaluation']:.4f}", f"{row['network_seconds_per_evaluation']:.4f}",
         f"{100 * row['outside']:.1f} %", "yes" if row["passed"] else "**no**")
        for row in rows
    ]  # fmt: skip
    print("\n" + _common.markdown(header, lines))
    print(f"\n{sum(row['passed'] for row in rows)} of {len(rows)} methods spend less than {100 * AIM:.0f} % outside.")


def main(args: list[str] | None = None) -> None:
    known = {name: kind for name, kind in find_methods().items() if kind.needs_prior}
    parser = _common.make_quality_parser(__doc__, "50")
    parser.add_argument("--methods", nargs="+", default=list(known), metavar="METHOD", help="by name (default all)")
    parser.add_argument("--evaluations", type=int, default=10, help="at most, where a method can be so short")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(args)
    if unknown := set(options.methods) - known.keys():
        raise InputError(f"There is no method {', '.join(sorted(unknown))}, expected some of {', '.join(known)}.")
    _common.weights_hash(options.prior)
    bench = Bench(_common.start(options, "methods"), options.size)
    batch = _common.load_batches(HELD_OUT, options.slices, options.size, options.batch_size)[0]
    contestants, left_out = {}, {}
    for name in options.methods:
        try:
            contestant = Contestant(bench, shorten(known[name], options.evaluations), options.prior, batch)
            contestant()
            contestants[name] = contestant
        except InputError as error:  # one that asks for more than these problems have
            left_out[name] = str(error)
            _common.progress(f"{name} is left out: {error}")
    rows = measure(contestants, options.repeats)
    report(rows)
    results: dict[str, Any] = {"rows": rows, "left_out": left_out, "aim": AIM, "passed": all(r["passed"] for r in rows)}
    bench.record.save(**results)


if __name__ == "__main__":
    _common.run(main)
