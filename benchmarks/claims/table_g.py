"""Table (g): a prior that has seen nothing but ellipses, adapted to one measurement of real anatomy.

The published tables compare adapted with unadapted priors under different data steps and lack two controls: the CG data
step without adaptation, and the in-distribution prior. Here every published recipe runs under its own sampler and under
ours, each with its control, next to expectation maximisation on the one measurement; `_recipes.recipes` lists the rows.
Work goes from cheap to expensive: what needs no adaptation, then EM, then the published recipes on a few slices. The
report is written after each setting, of all rows that the record holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import _common
from benchmarks._common import HELD_OUT, SETTINGS, Row, Setting
from benchmarks.claims._figures import rounds_figure
from benchmarks.claims._recipes import PUBLISHED, Recipe, recipes
from benchmarks.claims._run import Run, Table
from benchmarks.claims._verdicts import Verdict, cell, decide, difference, gap_share, interval, ratio
from invrecon.data.intensity import Intensity
from invrecon.metrics.summary import describe, summarise
from invrecon.operators import NoNoise

TITLE = "Test-time adaptation of a prior of ellipses"
SEVERAL, MOST, LOST = 2.0, 0.5, 0.3  # [dB], share, [dB]
COSTLY, POOLED = 15.0, 3.0  # times the unadapted reconstruction: EM of a slice, and of many by one adapter
CLOSED = {20: 0.6, 60: 0.8}  # share of the gap that EM is to close, by the number of views
BEATS, REACHES = "beats whole-image prior", "Adaptation reaches the in-distribution prior"
FIGURE = ("fbp", "tv", "patch-admm", "patch-em-admm", "patch-ct-admm")
FIGURE_SETTING = "20-clean"
ROUNDS = ("patch-em-admm-stop", "patch-em-admm", "patch-em-stop", "patch-em")  # of the first measured, rounds are drawn


class AdaptationTable(Run):
    """The table of test-time adaptation."""

    letter, title = "g", TITLE
    problems, others = ("20-clean", "60-clean", "20-noisy"), ("60-noisy",)
    every = 5

    @classmethod
    def list_recipes(cls) -> dict[str, Recipe]:
        """Returns the rows by their keys."""
        return recipes()

    def applies(self, key: str, setting: Setting) -> bool:
        """Says whether a row exists in a setting: the published recipes are for measurements without noise."""
        published = self.recipes[key].tier == PUBLISHED
        return super().applies(key, setting) and (without_noise(setting) or not published)

    def find(self, setting: Setting, table: Table) -> dict[str, Any]:
        """Returns summaries, differences, shares of the gap, costs and verdicts."""
        return find(table, self.recipes, setting)

    def introduction(self, machine: str) -> str:
        """Returns what the rows are."""
        dps = self.recipes["patch-dps"].method.schedule  # type: ignore[attr-defined]
        return INTRODUCTION.format(machine=machine, dps=len(dps))

    def describe(self, setting: Setting, table: Table, found: Mapping[str, Any]) -> Iterator[str]:
        """Yields rows, differences, and the numbers behind the verdicts."""
        yield from describe_setting(setting, table, self.recipes, found)

    def captions(self) -> dict[str, str]:
        """Returns captions by the ending of a figure's name."""
        return {".png": "One slice and its errors", "_rounds.png": "Rounds of EM"}

    def figures(self, tables: Mapping[str, Table], findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Draws the rounds of EM."""
        curves = {
            SETTINGS[name].title: rows
            for name, table in tables.items()
            if (rows := next(filter(None, map(table.get, ROUNDS)), None))
        }
        if curves:
            rounds_figure(self.beside("_rounds.png"), curves)

    def finish(self) -> None:
        """Draws one slice."""
        if FIGURE_SETTING in {setting.name for setting in self.settings} and set(FIGURE) <= set(self.chosen):
            self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draws one slice by the rows of `FIGURE`; not again unless something has changed."""
        from invrecon.report.figures import comparison_figure

        setting, options, path = SETTINGS[FIGURE_SETTING], self.options, self.beside(".png")
        (batch,) = _common.load_batches(HELD_OUT, str(options.figure_slice), options.size, 1)
        own = [self.recipes[key] for key in FIGURE]
        settings = {r.title: [_common.plain(r.method), _common.plain(r.adaptation), self._weights(r)] for r in own}
        identity = self.bench.identity(setting, own[0].method, None, batch.source[0], figure=settings, case=batch.id)
        if path.is_file() and self.bench.record.find("figure", identity) is not None:
            return
        images, decode = {}, Intensity().decode
        for key, recipe in zip(FIGURE, own, strict=True):
            result = self.bench.reconstruct(setting, self.entry(key, setting), batch)
            images[recipe.title], reference = decode(result.estimate.mean[0]), result.reference
        assert reference is not None
        voxel_mm = batch.voxel_mm[0]
        titled = {setting.title: images}
        comparison_figure(path, titled, decode(reference[0]), title=TITLE, subtitle=batch.id[0], voxel_mm=voxel_mm)
        self.bench.record.add({"figure": {"case": batch.id[0]}}, identity)

    def _weights(self, recipe: Recipe) -> str | None:
        prior = self.prior(recipe)
        return None if prior is None else _common.weights_hash(prior)


INTRODUCTION = """\
Rows use priors of random ellipses and `ProximalDiffusion` unless they say otherwise: *ADMM* is `AnnealedPnPADMM`, the
method of `tta_ct.yaml`, in the E-steps, too; *in distribution* is a prior of chest CT; *own sampler* is that of the
recipe's configuration (`patch_ss_ct.yaml`, `whole_ss_ct.yaml`, `scd_ct.yaml`, `ddip_ct.yaml`), and *...'s sampler* is
the same without updates of the network: what a learning rate of zero gives, noise and output taken from where the
recipe takes them. *SS* is the published self-supervision, *EM*
expectation maximisation on the one measurement (of whole images by fewer, larger steps), *of all slices* on those of
all 16 at once, which then share one adapter. *DPS* is PaDIS's data step and
transition with {dps} evaluations from the start of `ProximalDiffusion`, where 1000 from white noise were published: a
converged one may be better, and what is gained over it less. Recipes with few slices are too expensive for all;
differences are paired over the slices that both rows have. A claim *holds* or *does not hold* if the whole 95 %
interval is on one side of its limit, and is *undecided* otherwise. What stopping loses is against the best of the
rounds that were run; its rule was found on a validation slice and while looking at slices 10 and 35 of this table, so
that what it loses on these is a check and no test.

*x unadapted* is the time in units of the same prior's reconstruction, by ADMM for rows of that, in batches.
Measured on {machine}.
"""


def without_noise(setting: Setting) -> bool:
    """Says whether measurements are free of noise, which the published recipes are about."""
    return isinstance(setting.noise, NoNoise)


def stopped(table: Table, recipes: Mapping[str, Recipe], key: str) -> Sequence[Row]:
    """Returns the rows of an EM that stops by rays held out: those of its own key, where plain EM does not."""
    own = f"{key}-stop"
    return table.get(own if own in recipes else key) or []


def base(key: str, recipe: Recipe) -> str | None:
    """Returns the key of the unadapted reconstruction with the recipe's prior: by ADMM, if it is of that."""
    if not isinstance(recipe.prior, str):
        return None
    return recipe.prior.replace("_", "-").removesuffix("-ellipses") + admm(key)


def admm(key: str) -> str:
    """Returns the part of a key that says that ADMM is its sampler, empty if it is another."""
    return "-admm" if "-admm" in key else ""


def in_distribution(key: str) -> str:
    """Returns the key of the same row with the prior of chest CT in place of that of ellipses."""
    kind, *rest = key.split("-")
    return "-".join((kind, "ct", *rest))


def list_pairs(recipes: Mapping[str, Recipe]) -> Iterator[tuple[str, str, str]]:
    """Yields (group, a, b) for every difference a - b of the report."""
    for key, recipe in recipes.items():
        if recipe.control is not None:
            yield "adapted - unadapted", key, recipe.control
    for key in recipes:
        if key.startswith("patch") and (other := key.replace("patch", "whole", 1)) in recipes:
            yield "patch - whole", key, other
    for key in recipes:
        if key.startswith(("patch-ct", "whole-ct")) and (other := key.replace("-ct", "", 1)) in recipes:
            yield "in distribution - ellipses", key, other
    for kind in ("patch", "whole"):
        yield "CG - DPS, unadapted", kind, f"{kind}-dps"
        yield "CG - DPS, unadapted", f"{kind}-ss-off", f"{kind}-dps"
    for key in recipes:
        if key not in ("fbp", "tv"):
            yield "row - TV", key, "tv"


def find(table: Table, recipes: Mapping[str, Recipe], setting: Setting) -> dict[str, Any]:
    """Returns all that is made of a setting's rows: summaries, differences, shares of the gap, costs and verdicts."""
    differences = [
        {"group": group, "a": a, "b": b, **entry}
        for group, a, b in list_pairs(recipes)
        if (entry := difference(table.get(a), table.get(b))) is not None
    ]
    shares, costs = {}, {}
    for key, recipe in recipes.items():
        if (own := base(key, recipe)) is None or key == own or not table.get(key):
            continue
        if (cost := ratio(table[key], table.get(own))) is not None:
            costs[key] = cost
        if isinstance(recipe.prior, str) and recipe.prior.endswith("ellipses"):
            share = gap_share(table.get(own), table[key], table.get(in_distribution(own)))
            if share is not None:
                shares[key] = share
    return {
        "summaries": {key: {**summarise(rows), "median_seconds": _common.median_seconds(rows)}
                      for key, rows in table.items()},
        "differences": differences,
        "shares": shares,
        "costs": costs,
        "verdicts": list(judge_claims(table, recipes, setting)),
    }  # fmt: skip


def judge_claims(table: Table, recipes: Mapping[str, Recipe], setting: Setting) -> Iterator[Verdict]:
    """Yields a verdict on every claim, those of the publications first."""
    if without_noise(setting):
        yield from judge_published(table, recipes)
    yield from judge_em(table, recipes, CLOSED[setting.num_views])
    yield from judge_pool(table, CLOSED[setting.num_views])


def differences_of(table: Table) -> Callable[[str, str], dict[str, Any] | None]:
    """Returns what subtracts a row of a table from another, by their keys."""
    return lambda a, b: difference(table.get(a), table.get(b))


def judge_published(table: Table, recipes: Mapping[str, Recipe]) -> Iterator[Verdict]:
    """Yields verdicts on the published recipes."""
    minus = differences_of(table)
    for kind in ("patch", "whole"):
        several = f"Self-supervision improves the {kind} prior of ellipses by several dB"
        own = f"{kind}-ss-own"
        yield decide(f"{several}, over DPS (as published)", minus(own, f"{kind}-dps"), SEVERAL)
        yield decide(f"{several}, over its own sampler", minus(own, f"{kind}-ss-off"), SEVERAL)
        yield decide(f"{several}, under ProximalDiffusion", minus(f"{kind}-ss", kind), SEVERAL)
    for key in ("scd", "ddip"):
        claim = f"{recipes[key].title} improves the whole prior of ellipses by several dB, over its own sampler"
        yield decide(claim, minus(f"{key}-own", f"{key}-off"), SEVERAL)
    for kind in ("patch", "whole"):
        explained = gap_share(table.get(f"{kind}-dps"), table.get(f"{kind}-ss-off"), table.get(f"{kind}-ss-own"))
        claim = f"The CG data step alone explains most of the published gain ({kind})"
        yield decide(claim, explained, MOST, "%")
    yield decide(f"Patch prior + SS {BEATS} + SS, own samplers", minus("patch-ss-own", "whole-ss-own"), 0)
    yield decide(f"Patch prior + SS {BEATS} + SS, ProximalDiffusion", minus("patch-ss", "whole-ss"), 0)
    for key in ("patch-ss-own", "whole-ss-own", "scd-own", "ddip-own", "patch-ss"):
        yield decide(f"Adapted ellipses beat TV: {recipes[key].title}", minus(key, "tv"), 0)
    yield decide(f"{REACHES}: {recipes['patch-ss-own'].title}", minus("patch-ss-own", "patch-ct"), 0)


def judge_em(table: Table, recipes: Mapping[str, Recipe], share: float) -> Iterator[Verdict]:
    """Yields verdicts on EM of each slice alone, which is to close a share of the gap."""
    minus = differences_of(table)
    for tail in ("-admm", ""):
        under = "" if tail else ", ProximalDiffusion"
        em, whole, own = f"patch-em{tail}", f"whole-em{tail}", f"patch-ct-em{tail}"
        unadapted, known = f"patch{tail}", f"patch-ct{tail}"
        yield decide(f"Patch prior + EM {BEATS} + EM{under}", minus(em, whole), 0)
        for key in (em, whole):
            yield decide(f"Adapted ellipses beat TV: {recipes[key].title}", minus(key, "tv"), 0)
        yield decide(f"{REACHES}: {recipes[em].title}", minus(em, known), 0)
        closed = gap_share(table.get(unadapted), table.get(em), table.get(known))
        closes = f"EM closes at least {100 * share:.0f} % of the gap to the in-distribution prior{under}"
        yield decide(closes, closed, share, "%")
        for key, where in ((em, ""), (own, ", in distribution")):
            loss = interval(stopped(table, recipes, key), stopping_loss)
            claim = f"Stopping without the truth loses at most {LOST} dB of the rounds that were run{where}{under}"
            yield decide(claim, loss, LOST, at_least=False)
        yield decide(f"EM improves the in-distribution prior{under}", minus(own, known), 0)
        cost = difference(stopped(table, recipes, own), table.get(known))
        yield decide(f"EM with that stop costs the in-distribution prior at most 0.1 dB{under}", cost, -0.1)
        times = ratio(table.get(em), table.get(unadapted))
        slow = f"EM takes at most {COSTLY:.0f} times the unadapted time{under}"
        yield decide(slow, times, COSTLY, "x", at_least=False)


def judge_pool(table: Table, share: float) -> Iterator[Verdict]:
    """Yields verdicts on EM whose slices share one adapter."""
    em, unadapted, known = (table.get(key) for key in ("patch-em-admm-pool", "patch-admm", "patch-ct-admm"))
    of_all = "EM of all slices"
    yield decide(f"{of_all} beats that of each alone", difference(em, table.get("patch-em-admm")), 0)
    yield decide(f"{of_all} beats TV", difference(em, table.get("tv")), 0)
    long = table.get("patch-em-admm-pool-16")
    for label, own in ((of_all, em), (f"{of_all} in 16 rounds", long)):
        claim = f"{label} closes at least {100 * share:.0f} % of the gap to the in-distribution prior"
        yield decide(claim, gap_share(unadapted, own, known), share, "%")
    yield decide(f"{of_all} reaches the in-distribution prior", difference(em, known), 0)
    own = table.get("patch-ct-em-admm-pool")
    yield decide(f"{of_all} improves the in-distribution prior", difference(own, known), 0)
    slow = f"{of_all} takes at most {POOLED:.0f} times the unadapted time"
    yield decide(slow, ratio(em, unadapted), POOLED, "x", at_least=False)


def stopping_loss(row: Row) -> float | None:
    """Returns what the chosen step lost against the best one: PSNR of the steps' own estimates, in [dB]."""
    trace, step = row.get("psnr_trace"), row.get("stopped_step", -1)
    if not trace or None in trace or step < 0:
        return None
    return max(trace) - trace[step]


def describe_setting(
    setting: Setting, table: Table, recipes: Mapping[str, Recipe], found: Mapping[str, Any]
) -> Iterator[str]:
    """Yields the Markdown of a setting: rows, differences, and the numbers behind its verdicts."""
    yield f"## {setting.title}\n"
    lines = []
    for key, rows in table.items():
        evaluations = found["summaries"][key].get("num_evaluations", {}).get("mean")
        lines.append((
            recipes[key].title, *_common.metric_cells(rows), cell(found["costs"].get(key), "x").split()[0],
            "-" if evaluations is None else f"{evaluations:.0f}",
            cell(found["shares"].get(key), "%"), len(rows),
        ))  # fmt: skip
    header = ["", *_common.METRIC_HEADINGS, "x unadapted", "Evaluations", "Share of the gap closed", "Slices"]
    yield _common.markdown(header, lines) + "\n"
    notes = (describe(summary) for summary in found["summaries"].values())
    yield "\n".join(f"{note}  " for note in dict.fromkeys(notes)) + "\n"
    pairs = [
        (entry["group"], f"({recipes[entry['a']].title}) - ({recipes[entry['b']].title})", cell(entry),
         entry["num_cases"])
        for entry in found["differences"]
    ]  # fmt: skip
    if pairs:
        yield _common.markdown(["Differences in PSNR", "paired", "dB", "Slices"], pairs) + "\n"
    yield _common.markdown(["Claim", "Verdict", "Because"], ((v.claim, v.outcome, v.because)
                                                            for v in found["verdicts"])) + "\n"  # fmt: skip
