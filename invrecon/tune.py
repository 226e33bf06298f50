"""`invrecon tune --config NAME.yaml --data.paths VALIDATION`: searches for better settings on validation cases.

Every trial is one `invrecon test` of the configuration with other values for what is tuned, on the same cases with the
same noise. The result, `tuned.yaml`, is given to the test as one more --config.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from invrecon.errors import InputError
from invrecon.files import atomic_write, to_json, write_csv
from invrecon.metrics.summary import COLUMNS, format_value, heading
from invrecon.operators import NoNoise
from invrecon.priors.weights import SUFFIX, file_hash
from invrecon.report.provenance import fingerprint
from invrecon.search import Choices, Domain, Search, Space, Values, check_keys, default_space, parse_domain
from invrecon.shared import find_shared

METRICS = tuple(name for name, column in COLUMNS.items() if column.better > 0)  # they compare with the reference
SILENT = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
OF_THE_CASES = ("--data.paths", "--data.slices")
EPILOG = """\
All other options are those of `invrecon test`: --config, --data.paths, --model.method, ... The cases have to be
validation cases: settings that were tuned on a case say nothing about how well a method does on it, so never test on
them. `tuned.yaml` lists their ids and hashes.

--search is YAML, keys are those below --model., and a range is one of

  'method.weight: [1e-4, 1e-1, log]'          numbers, alike in ratio
  'method.sigma_max: [0.05, 0.5]'             numbers
  'method.cg_iterations: [2, 20, int]'        whole numbers, both ends included; [2, 200, int, log]
  'method.transition: {choices: [DDIM, Renoise]}'

or a YAML file of such lines. Without --search the method's own default ranges are taken. The first trial is the
configuration as it is; then points of a Sobol sequence and steps from the best trial take turns. A trial that fails
(a method that diverges) counts as one. The same command goes on where it was interrupted, and with more --trials.
Methods are compared fairly if each is tuned by the same number of trials on the same cases. Example:

  invrecon tune --config tv_ct.yaml --data.paths VALIDATION --search 'method.weight: [1e-7, 1e-2, log]' --output tv
  invrecon test --config tv_ct.yaml --config tv/tuned.yaml --data.paths TEST
"""


class _Parser(argparse.ArgumentParser):
    """A parser that raises, so that one sentence can say what was wrong."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"tune: {message}; `invrecon tune --help` lists what there is.")


def _parser() -> _Parser:
    parser = _Parser(
        "invrecon tune",
        description=__doc__,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--search", action="append", default=[], metavar="YAML", help="a key and its range, or a file of them")
    add("--trials", type=int, default=20, metavar="N", help="the budget, the default's trial included (default: 20)")
    add("--metric", choices=METRICS, default="psnr", help="whose mean over the cases is to be largest (default: psnr)")
    add("--seed", type=int, default=0, help="of the search (default: 0); the noise is that of model.seed in all trials")
    add("--output", type=Path, metavar="DIR", help="where to write (default: outputs/tune/CONFIG/METHOD)")
    return parser


@dataclass
class Trial:
    """One line of `trials.csv`.

    Attributes:
        values: What was tried, by key.
        score: The metric's mean, None if the trial failed.
        seconds: How long it took, in [s].
        error: Why it failed, empty if it did not.
    """

    values: Values
    score: float | None
    seconds: float
    error: str = ""


def main(args: list[str], run: Callable[[list[str]], Any]) -> None:
    """Runs `invrecon tune`.

    Args:
        args: Arguments after the command's name.
        run: The command line, which runs `test` and returns its CLI object.

    Raises:
        InputError: If the arguments, the search space or the cases cannot be used, or all trials failed.
    """
    options, rest = _parser().parse_known_args(args)
    if options.trials < 1:
        raise InputError(f"--trials is {options.trials}, expected at least 1.")
    if "--print_config" in rest:
        raise InputError("tune has no configuration of its own to print: use `invrecon test ... --print_config`.")
    space = read_space(options.search)
    with contextlib.redirect_stdout(io.StringIO()):
        cli = run(["test", *rest, *SILENT, "--trainer.limit_test_batches=0"])  # all is checked, nothing is done
    if cli.trainer.world_size > 1:
        raise InputError(f"tune runs on one device, got {cli.trainer.world_size}: set --trainer.devices=1.")
    settings = cli.settings()
    refuse_samples(settings["data"]["init_args"].get("paths"))
    model, method = settings["model"], type(cli.model.method).__name__
    cases, noisy = read_cases(cli.datamodule.test_dataloader(), not isinstance(cli.model.noise, NoNoise))
    space = space or default_space(method, noisy)
    default = {key: check_default(key, find(model, key), domain) for key, domain in space.items()}
    ranges = {key: domain.describe() for key, domain in space.items()}
    described = {"model": model, "space": ranges, "metric": options.metric, "seed": options.seed}
    weights = [cli.model.weights_sha256]
    if isinstance(names := model.get("prior"), list):  # trials may take another one: all count
        weights = [file_hash(find_shared(name, "checkpoints", SUFFIX)) for name in names]
    inputs = [*(f"{name} {value}" for name, value in cases.items()), *map(str, weights[1:])]
    identity = fingerprint(described, weights[0], inputs)
    output = options.output or Path("outputs") / "tune" / cli.config_name / method

    def try_out(values: Values, number: int) -> Trial:
        changes = [f"--model.{key}={_text(value)}" for key, value in values.items()] if number > 1 else []
        folder = output / "trials" / f"{number:03d}"
        start = time.perf_counter()
        score, error = run_trial(run, ["test", *rest, *changes, *SILENT], folder, options.metric)
        return Trial(values, score, time.perf_counter() - start, error)

    print(f"{method}: {options.trials} trials on {len(cases)} validation cases, of " + ", ".join(space), flush=True)
    search = Search(space, default, options.seed)
    trials = carry_out(search, options.trials, output / "trials.csv", identity, options.metric, try_out)
    if search.best is None:
        raise InputError(f"All {len(trials)} trials failed, the first one so: {trials[0].error}")
    scores = [trial.score for trial in trials if trial.score is not None]
    if len(scores) > 1 and len(set(scores)) == 1:
        print(f"All {len(scores)} trials read the same: nothing of {', '.join(space)} has an effect on these cases.")
    lines = comment(options, method, trials, search.best, ranges, cases)
    tuned = yaml.safe_dump(overrides(model, trials[search.best].values), sort_keys=False)
    with atomic_write(output / "tuned.yaml") as file:
        comments = "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)  # a file's name may hold anything
        file.write((comments + tuned).encode())
    print(table(trials, options.metric))
    print(f"Written to {output}: tuned.yaml, trials.csv. On other cases than these:")
    command = ["invrecon", "test", *_without(rest, OF_THE_CASES), "--config", str(output / "tuned.yaml")]
    print(f"  {shlex.join(command)} --data.paths FILES")


def refuse_samples(paths: Any) -> None:
    """Refuses the samples that the configs come with.

    Raises:
        InputError: A path is none of the user's, but the name of a shipped file.
    """
    for name in [paths] if isinstance(paths, str) else paths or ():
        if not Path(name).expanduser().exists():
            raise InputError(
                f"tune would search on '{name}', a shipped sample, which is there to test on: name your validation "
                "cases with --data.paths."
            )


def read_space(texts: Sequence[str]) -> Space:
    """Returns what the --search options say.

    Raises:
        InputError: One is neither a mapping in YAML nor a file of one, or a range is of no use.
    """
    space: Space = {}
    for text in texts:
        try:
            named = Path(text).suffix in (".yaml", ".yml")
            content = yaml.safe_load(Path(text).read_text() if named else text)
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--search '{text}' cannot be read: {reason}.") from None
        if not isinstance(content, Mapping) or not content:
            raise InputError(f"--search is '{text}', expected a key and its range: 'method.weight: [1e-4, 1e-1, log]'.")
        for key, value in content.items():
            name = str(key).removeprefix("model.")
            if name in space:
                raise InputError(f"--search names {name} twice: give one range.")
            space[name] = parse_domain(name, value)
    check_keys(list(space))
    return space


def find(model: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a dotted key in the resolved configuration of the model.

    Raises:
        InputError: There is no such key.
    """
    node: Any = model
    names = key.split(".")
    for depth, name in enumerate(names):
        arguments = (node.get("init_args") or {}) if isinstance(node, Mapping) else {}
        if name not in arguments:
            owner = ".".join(["model", *names[:depth]])
            kind = _class_name(node["class_path"]) if isinstance(node, Mapping) and "class_path" in node else str(node)
            has = ", ".join(arguments) or "nothing to set"
            raise InputError(f"There is no model.{key} to tune: {owner} is {kind}, which has {has}.")
        node = arguments[name]
    return node


def check_default(key: str, default: Any, domain: Domain) -> Any:
    """Returns the default of a key, whose type its domain has to have.

    Raises:
        InputError: A range of numbers was given for something else, or of fractions for a whole number.
    """
    if isinstance(domain, Choices) or default is None:
        return default
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise InputError(f"model.{key} is {default}, which is no number: give {{choices: [...]}}.")
    if isinstance(default, int) and not isinstance(domain.value(0.5), int):
        raise InputError(f"model.{key} is {default}, a whole number: write its range as [low, high, int].")
    return default


def read_cases(batches: Iterable[Any], simulated_noise: bool) -> tuple[dict[str, str], bool]:
    """Returns the SHA-256 of each case, by its id, and whether the measurements have noise that is known.

    Of a case that is measured by the operator, the reference is all; of one that came with its measurement, that and
    what is known of it (noise, coils) decide the numbers, too.

    Args:
        batches: Of the data module.
        simulated_noise: Whether a case that is measured by the operator gets noise.

    Raises:
        InputError: A case has no reference, so that no trial could be judged by it.
    """
    hashes, noisy = {}, False
    for batch in batches:
        if batch.reference is None:
            raise InputError(
                f"{batch.source[0]} is a measurement without a reference, by which no trial can be judged: tune on "
                "volumes, whose measurement is simulated."
            )
        noisy |= simulated_noise if batch.measurement is None else batch.noise_std is not None
        for b, name in enumerate(batch.id):
            digest = hashlib.sha256()
            for tensor in (batch.reference, batch.measurement, batch.noise_std, batch.maps, batch.mask):
                if tensor is not None:
                    digest.update(tensor[b].contiguous().numpy().tobytes())
            hashes[name] = digest.hexdigest()
    return hashes, noisy


def run_trial(
    run: Callable[[list[str]], Any], args: Sequence[str], folder: Path, metric: str
) -> tuple[float | None, str]:
    """Runs one test in silence; returns the metric's mean, or None and what was wrong.

    Raises:
        InputError: The cases have no such metric.
    """
    shutil.rmtree(folder / ".parts", ignore_errors=True)  # of a trial that was interrupted, perhaps with other settings
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run([*args, "--output", str(folder)])
    except (InputError, torch.OutOfMemoryError) as error:
        return None, str(error).splitlines()[0]
    summary = json.loads((folder / "summary.json").read_text())
    if (score := summary.get(metric, {}).get("mean")) is None:  # nor will another trial have it
        there = ", ".join(name for name in METRICS if summary.get(name, {}).get("mean") is not None)
        raise InputError(f"There is no {metric} of these cases, but {there or 'no metric at all'}: set --metric.")
    return score, ""


def carry_out(
    search: Search,
    num_trials: int,
    path: Path,
    identity: str,
    metric: str,
    try_out: Callable[[Values, int], Trial],
) -> list[Trial]:
    """Runs the trials that `path` does not hold yet, and keeps each there as soon as it is done.

    Raises:
        InputError: `path` is of another search.
    """
    kept = read_trials(path, identity, metric)
    trials: list[Trial] = []
    for number in range(1, num_trials + 1):
        values = search.propose()
        if values is None:
            print(f"All values have been tried after {len(trials)} trials.")
            break
        known = kept[number - 1] if number <= len(kept) else None
        again = known is not None and all(known.get(key) == _text(value) for key, value in values.items())
        if known is not None and again:
            score = float(known[metric]) if known[metric] else None
            trial = Trial(values, score, float(known["seconds"]), known["error"])
        else:
            trial = try_out(values, number)
        trials.append(trial)
        search.record(values, trial.score)
        if not again:
            kept = []
            write_csv(path, [_row(i, trial, identity, metric) for i, trial in enumerate(trials, start=1)])
        best = " (best so far)" if search.best == number - 1 else ""
        shown = trial.error if trial.score is None else f"{heading(metric)} {format_value(metric, trial.score)}{best}"
        print(f"trial {number}/{num_trials}   {_label(values)}   {shown}   {trial.seconds:.1f} s", flush=True)
    return trials


def read_trials(path: Path, identity: str, metric: str) -> list[dict[str, str]]:
    """Returns the lines of `trials.csv`, none if there is no such file.

    Raises:
        InputError: The file is of another search.
    """
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if any(row.get("fingerprint") != identity or metric not in row for row in rows):
        raise InputError(
            f"{path} is of another search (other settings, ranges, metric, seed, weights or cases): choose another "
            "--output, or remove that folder."
        )
    return rows


def overrides(model: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """Returns the tuned keys as a configuration that is laid over the one they were tuned in.

    Classes on the way are named, so that the values always reach the class they were tuned for.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        node, place = model, result
        *owners, name = key.split(".")
        for owner in owners:
            node = node["init_args"][owner]
            place = place.setdefault("init_args", {}).setdefault(owner, {"class_path": _class_name(node["class_path"])})
        place.setdefault("init_args", {})[name] = value
    return {"model": result}


def comment(
    options: argparse.Namespace,
    method: str,
    trials: Sequence[Trial],
    best: int,
    ranges: Mapping[str, Any],
    cases: Mapping[str, str],
) -> list[str]:
    """Returns the lines that tell where the values of `tuned.yaml` come from."""
    metric, score, first = options.metric, trials[best].score, trials[0].score
    num_failed = sum(trial.score is None for trial in trials)
    return [
        f"{method}, tuned by `invrecon tune` on the validation cases below; never test on them.",
        f"{heading(metric)}: {format_value(metric, score)}, by default {format_value(metric, first)}",
        f"metric: {metric}, trials: {len(trials)} of {options.trials} ({num_failed} failed), best: {best + 1}, "
        f"seed: {options.seed}",
        *(f"search: {key}: {to_json(text)}" for key, text in ranges.items()),
        "cases, with the SHA-256 of their references:",
        *(f"  {name} {value}" for name, value in cases.items()),
    ]


def table(trials: Sequence[Trial], metric: str) -> str:
    """Returns all trials, best first, as a table for the terminal."""
    keys = list(trials[0].values)
    order = sorted(range(len(trials)), key=lambda i: (trials[i].score is None, -(trials[i].score or 0.0), i))
    lines = [["trial", *keys, heading(metric), "Time [s]"]]
    for number in order:
        trial = trials[number]
        score = "failed" if trial.score is None else format_value(metric, trial.score)
        lines.append([str(number + 1), *(_text(trial.values[key]) for key in keys), score, f"{trial.seconds:.1f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("   ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _row(number: int, trial: Trial, identity: str, metric: str) -> dict[str, Any]:
    values = {key: _text(value) for key, value in trial.values.items()}
    status = "ok" if trial.score is not None else "failed"
    outcome = {"status": status, metric: trial.score, "seconds": trial.seconds, "error": trial.error}
    return {"trial": number, **values, **outcome, "fingerprint": identity}


def _label(values: Values) -> str:
    return ", ".join(f"{key} = {_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    """A value as on the command line."""
    return value if isinstance(value, str) else to_json(value)


def _class_name(path: str) -> str:
    """A class as configs name it: ours by their short names."""
    return path.rpartition(".")[2] if path.startswith("invrecon.") else path


def _without(args: Sequence[str], names: Sequence[str]) -> list[str]:
    """Arguments without some options, written as one word or two."""
    left, skip = [], False
    for arg in args:
        if not skip and not arg.startswith(tuple(f"{name}=" for name in names)) and arg not in names:
            left.append(arg)
        skip = arg in names
    return left
