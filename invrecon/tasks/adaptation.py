"""From measurements to images by a prior that is adapted to each of them first."""

from __future__ import annotations

from torch import Tensor

from invrecon.adapt.base import Adaptation, Trace
from invrecon.adapt.suitability import SuitabilityTest
from invrecon.errors import InputError
from invrecon.methods.base import Estimate
from invrecon.methods.sampling import Sampler
from invrecon.operators.base import LinearOperator
from invrecon.operators.noise import NoiseModel
from invrecon.priors.layouts import Layout
from invrecon.rng import Generators
from invrecon.tasks.priors import choose_prior
from invrecon.tasks.reconstruction import Reconstruction


class TestTimeAdaptation(Reconstruction):
    """Reconstructs cases by a sampler whose prior is adapted to each measurement, and then forgotten.

    The prior itself never changes: an adaptation works on a copy. See `Reconstruction` for everything else.

    Args:
        operator: The physics; for measurement files, whose geometry is their own, the size of its images.
        method: The sampler that turns `y` into `x` by means of the adapted prior.
        adaptation: What adapts, and how.
        noise: Noise of simulated measurements; none by default.
        prior: A prior file, or the bare name of a shipped one, or a list of them as of `Reconstruction`; required.
        precision: Of the prior's network: `32`, `bf16`, `16`, or `auto` for bfloat16 where the hardware has it and
            float32 elsewhere. State and operators are float32 always.
        seed: Of noise, sampling and adaptation.
        num_figures: Slices a volume that `predict` draws.
        save_samples: Whether `predict` writes every posterior sample beside mean and standard deviation.
        pool: Whether the slices of one batch share one adapter; data.batch_size says how many.
        suitability: Adapts only where this test finds the prior unsuited to the measurement; everywhere if None.
        layout: Where a patch prior lays its patches, instead of on a grid at one random offset an evaluation.

    Raises:
        InputError: If `method` is no sampler or `adaptation` no adaptation.
    """

    __test__ = False  # no test of pytest's, whatever its name begins with

    method: Sampler

    def __init__(
        self,
        operator: LinearOperator,
        method: Sampler,
        adaptation: Adaptation,
        noise: NoiseModel | None = None,
        prior: str | list[str] | None = None,
        precision: str = "auto",
        seed: int = 0,
        num_figures: int = 4,
        save_samples: bool = False,
        pool: bool = False,
        suitability: SuitabilityTest | None = None,
        layout: Layout | None = None,
    ) -> None:
        if not isinstance(method, Sampler):
            raise InputError(
                f"model.method is {type(method).__name__}, but only a prior that a sampler works with can be adapted: "
                "use a sampler such as ProximalDiffusion, or --model=Reconstruction."
            )
        if not isinstance(adaptation, Adaptation):
            raise InputError(f"model.adaptation is {type(adaptation).__name__}, which is no adaptation.")
        # What adapts asks the prior, too, and the base class knows the sampler alone: of several, one is taken here.
        level = max(method.highest_level, adaptation.highest_level)
        if (path := choose_prior(prior, level)) is not None:
            prior = str(path)
        super().__init__(operator, method, noise, prior, precision, seed, num_figures, save_samples, layout)
        self.adaptation, self.pool, self.suitability = adaptation, pool, suitability

    @property
    def highest_level(self) -> float:
        """The highest noise level at which the prior is asked, by the sampler or while it adapts."""
        return max(super().highest_level, self.adaptation.highest_level)

    @property
    def label(self) -> str:
        """The names of sampler and adaptation."""
        return f"{super().label} + {type(self.adaptation).__name__}"

    def solve(
        self, y: Tensor | None, operator: LinearOperator, generators: Generators
    ) -> tuple[Estimate, list[Trace] | None]:
        """Returns the estimate by the adapted prior, and how it came to be."""
        assert y is not None and self.prior is not None  # seen to by `reconstruct` and by the constructor
        return self.adaptation(
            y, operator, self.prior, self.method, generators, pool=self.pool, suitability=self.suitability
        )

    def describe(self) -> dict[str, str]:
        """Returns the facts of the run for its report, with what adapts."""
        trainable = getattr(self.adaptation, "trainable", None)
        what = "" if trainable is None else f" of {type(trainable).__name__}"
        for_whom = "shared by the slices of a batch" if self.pool else "anew for every slice"
        where = "" if self.suitability is None else ", where the prior does not suit"
        return {**super().describe(), "adaptation": f"{type(self.adaptation).__name__}{what}, {for_whom}{where}"}
