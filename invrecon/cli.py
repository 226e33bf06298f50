"""The command line: `invrecon fit | validate | test | predict | tune --config NAME.yaml`, `invrecon import-weights`."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

# Short class names resolve among imported classes: these imports are the vocabulary of the configs.
import invrecon.adapt
import invrecon.data.generation
import invrecon.data.mri
import invrecon.data.reconstruction
import invrecon.data.training
import invrecon.methods
import invrecon.operators
import invrecon.priors.layouts
import invrecon.priors.unet
import invrecon.tasks.adaptation
import invrecon.tasks.reconstruction
import invrecon.tasks.score_matching
from invrecon.allocator import keep_freed_memory
from invrecon.arguments import carried_over, refuse_null, spell
from invrecon.complaints import complaint
from invrecon.discovery import reach_named_files
from invrecon.errors import InputError
from invrecon.precision import training_precision
from invrecon.report.writer import ResultWriter
from invrecon.tasks.checkpoint import AtomicCheckpointIO, ExportPrior
from invrecon.tasks.previews import TrainingPreviews
from invrecon.tasks.progress import RunProgress
from invrecon.tasks.same_run import SameRun, began_from, what_decides

COMMANDS = {
    "fit": "learns a prior",
    "validate": "measures its loss",
    "test": "reconstructs cases whose truth is known, and judges",
    "predict": "reconstructs and writes images",
    "tune": "searches a method's settings",
    "import-weights": "makes a prior of others' weights",
}
# What a model and its data must have for a command.
HOOKS = {
    "fit": ("training_step", "train_dataloader"),
    "validate": ("validation_step", "val_dataloader"),
    "test": ("test_step", "test_dataloader"),
    "predict": ("predict_step", "predict_dataloader"),
}


class InvreconCLI(LightningCLI):
    """LightningCLI with one more argument, `--output`, under which everything that a run writes is found."""

    output: Path
    command: list[str]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser that raises, so that one sentence can say what was wrong."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Makes the parser of a command; an empty one if another command was given, which spares a second of start."""
        if self.command[1:] and self.command[1] in HOOKS and self.command[1] != subcommand:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments.

        Raises:
            InputError: If they are not understood.
        """
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            missing = "" if any(arg.startswith(("--config", "-c")) for arg in args) else " No --config was given."
            raise InputError(complaint(str(error)) + missing) from None

    def _parse_ckpt_path(self) -> None:
        """Takes no settings from a checkpoint: it is for resuming alone, and is read once, by `AtomicCheckpointIO`."""

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer; what they refuse comes out in their own words, not wrapped by the parser.

        Raises:
            InputError: If one of them refuses an argument.
        """
        for part in ("model", "data"):
            refuse_null(self.config[self.subcommand].get(part), part)
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    def after_instantiate_classes(self) -> None:
        """Refuses a config of another command, and says what a method has been given that was meant for another.

        Raises:
            InputError: If its model or its data do not know the command.
        """
        for part, hook in zip((self.model, self.datamodule), HOOKS[str(self.subcommand)], strict=True):
            if not is_overridden(hook, part):
                raise InputError(
                    f"{type(part).__name__} is not for `invrecon {self.subcommand}` (it has no {hook}): choose another "
                    "command or --config."
                )
        config = self.config[self.subcommand]
        method = config.model.get("init_args", {}).get("method")
        if method is not None:
            paths = [Path(str(path)) for path in config.get("config") or []]
            said = carried_over(paths, "method", type(self.model.method), vars(method.get("init_args", Namespace())))
            if said:
                warnings.warn(said, stacklevel=1)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--output`."""
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="folder of all that the run writes (default: outputs/<command>/<time>; fit: outputs/fit/<config>)",
        )

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Gives the Trainer the run's folder."""
        config = self.config[self.subcommand]
        self.output = Path(config.output or default_output(str(self.subcommand), self.config_name))
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"--output '{self.output}' is a file, not a folder: name one for all that the run writes.")
        return super().instantiate_trainer(default_root_dir=str(self.output), **kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[lightning.Callback]) -> lightning.Trainer:
        """Adds what the command needs: checkpoints, logs and export to `fit`, a writer to `test` and `predict`."""
        if self.subcommand in ("fit", "validate") and config.get("precision") is None:
            config["precision"] = training_precision(training_device(config.get("accelerator", "auto")))
        if self.subcommand != "fit":
            self.save_config_callback = None  # a writer keeps the configuration, once it knows the folder is ours
            config["logger"] = False
        if self.subcommand in ("test", "predict"):
            callbacks = [*callbacks, self._writer()]
            config["enable_checkpointing"] = False
            config["inference_mode"] = False  # guidance and adaptation need autograd
        elif self.subcommand == "fit":
            logs = config.get("logger") is not False
            callbacks = [*callbacks, *([LearningRateMonitor("step")] if logs else []), *self._training_callbacks()]
        if self.subcommand == "fit" and config.get("logger") is None:
            config["logger"] = TensorBoardLogger(str(self.output), name="tensorboard", version="")
        if config.get("enable_progress_bar") is not False and sys.stderr.isatty():
            callbacks = [*callbacks, RunProgress() if self.subcommand == "fit" else RichProgressBar()]
        config["plugins"] = [*(config.get("plugins") or []), AtomicCheckpointIO()]
        config["use_distributed_sampler"] = False  # the data modules share out batches and cases themselves
        return super()._instantiate_trainer(config, callbacks)

    def _writer(self) -> ResultWriter:
        text = self._text
        return ResultWriter(self.output, yaml.safe_load(text), text, self.command)

    def settings(self) -> dict[str, Any]:
        """Returns the resolved configuration, every argument of every class in it."""
        return yaml.safe_load(self._text)

    @property
    def config_name(self) -> str:
        """The name of the last --config, without its ending."""
        return _config_name(self.config[self.subcommand])

    @cached_property
    def _text(self) -> str:
        """The resolved configuration, as YAML."""
        config = self.config[self.subcommand]
        return self._parser(self.subcommand).dump(config, skip_link_targets=False, skip_unset=False)

    def _dump_config(self) -> None:
        """Keeps what Lightning hands to model and data as their hyperparameters: one dump serves it and us."""
        if not hasattr(self, "config_dump"):
            self.config_dump = self.settings()

    def _training_callbacks(self) -> list[lightning.Callback]:
        asked = self.config.fit.get("ckpt_path")
        newest = ModelCheckpoint(
            dirpath=self.output / "checkpoints",
            filename="last",
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        return [
            newest,
            TrainingPreviews(),
            SameRun(what_decides(self.settings()), None if asked is None else str(asked)),
            ExportPrior(str(self.output), shlex.join(self.command)),
        ]

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command; Lightning's own exit after Ctrl-C becomes what everyone else's is."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as end:
            if isinstance(end, SIGTERMException) or not self.trainer.interrupted:
                raise
            raise KeyboardInterrupt from None

    def before_fit(self) -> None:
        """Resumes from the run's newest checkpoint, so that the same command continues an interrupted run.

        That is the last epoch's, or what was saved when SLURM took the job from its node (`hpc_ckpt_N.ckpt`). Another
        one that is asked for is where a run begins, and not where it goes on.
        """
        config, asked = self.config_init.fit, self.config_init.fit.get("ckpt_path")
        found = [*self.output.glob("checkpoints/last.ckpt"), *self.output.glob("hpc_ckpt_*.ckpt")]
        if found and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            newest = max(found, key=lambda path: path.stat().st_mtime_ns)
            if asked is None or began_from(newest) == str(asked):
                config.ckpt_path = str(newest)

    def before_validate(self) -> None:
        """Validates the run's newest checkpoint unless another is given.

        Raises:
            InputError: If there is none.
        """
        config = self.config_init.validate
        last = self.output / "checkpoints" / "last.ckpt"
        if config.get("ckpt_path") is None:
            if not last.is_file():
                raise InputError(
                    f"There is no checkpoint '{last}' to validate: run `invrecon fit` first, or give --ckpt_path."
                )
            config.ckpt_path = str(last)

    def before_test(self) -> None:
        """Refuses a checkpoint of a training, and a seed that decides nothing."""
        self._refuse_checkpoint()
        self._refuse_seed()

    def before_predict(self) -> None:
        """Keeps no predictions in memory: the writer has them. Refuses as `test` does."""
        self.config_init.predict.return_predictions = False
        self._refuse_checkpoint()
        self._refuse_seed()

    def _refuse_checkpoint(self) -> None:
        if (path := self.config[self.subcommand].get("ckpt_path")) is not None:
            raise InputError(
                f"--ckpt_path '{path}' is for `invrecon fit` and `validate`: give the prior that the training exported "
                "as --model.prior FOLDER/prior.safetensors."
            )

    def _refuse_seed(self) -> None:
        given, own = self.config[self.subcommand].get("seed_everything"), getattr(self.model, "seed", 0)
        if not isinstance(given, bool) and given not in (None, 0, own):
            raise InputError(
                f"seed_everything is {given}, but noise and samples are drawn by model.seed, which is {own}: give "
                f"--model.seed {given} instead."
            )


def training_device(accelerator: Any) -> str:
    """Returns the kind of device that a Trainer's accelerator computes on."""
    name = str(accelerator)
    if name in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if name == "cpu" or (name == "auto" and not torch.backends.mps.is_available()):
        return "cpu"
    return "other"


def _config_name(config: Any) -> str:
    paths = config.get("config") or []
    return Path(str(paths[-1])).stem if paths else "run"


def default_output(command: str, config_name: str) -> Path:
    """Returns where a run writes by default: a fit can be found again by its config, other runs by their time."""
    if command in ("fit", "validate"):
        return Path("outputs") / "fit" / config_name
    return Path("outputs") / command / time.strftime("%Y-%m-%d_%H-%M-%S")


def main(args: list[str] | None = None) -> InvreconCLI | None:
    """Runs the command line.

    Args:
        args: Arguments without the program's name; those of the process by default.

    Returns:
        The CLI object, whose `trainer`, `model` and `datamodule` a notebook may go on with; None of
        `import-weights` and `--version`, which train and reconstruct nothing, and of `tune`, which tests many times.

    Raises:
        InputError: If anything that the user gave cannot be used.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*`isinstance.treespec, LeafSpec.` is deprecated.*")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", ".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", ".*Your `IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*when using `ckpt_path`, callbacks used to create the checkpoint.*")
    warnings.filterwarnings("ignore", ".*module.s. in eval mode at the start of training.*")
    for talkative in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["--version"]:
        print(f"invrecon {invrecon.__version__}")
        return None
    if not args or not (args[0] in COMMANDS or args[0].startswith("-")):
        listed = "; ".join(f"`{name}` {does}" for name, does in COMMANDS.items())
        raise InputError(
            f"{f'There is no command {args[0]!r}' if args else 'No command was given'}. There are {listed}."
        )
    if args[:1] == ["import-weights"]:
        from invrecon.priors.thirdparty.command import main as import_weights

        import_weights(args[1:])
        return None
    if args[:1] == ["tune"]:
        from invrecon.tune import main as tune

        tune(args[1:], main)
        return None
    keep_freed_memory()
    InvreconCLI.command = ["invrecon", *args]
    args = spell(args)
    reach_named_files(args)
    return InvreconCLI(
        lightning.LightningModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"prog": "invrecon", "description": __doc__},
        args=args,
    )


def to_continue(args: list[str]) -> str:
    """Returns how to go on with a command that was ended."""
    if args[:1] == ["predict"] and not any(arg.partition("=")[0] == "--output" for arg in args):
        return "to continue, run the same command again with the folder that it began as --output."
    if args[:1] == ["test"]:
        return "`test` begins anew."
    return "run the same command again to continue."


def main_entry() -> None:
    """The console script: one sentence and status 1 for what the user can mend, a traceback only for our own faults."""
    try:
        main()
    except InputError as error:
        print(f"invrecon: {error}", file=sys.stderr)
        sys.exit(1)
    except MisconfigurationException as error:
        print(f"invrecon: {str(error).splitlines()[0]} Look at the `trainer` options.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"invrecon: interrupted; {to_continue(sys.argv[1:])}", file=sys.stderr)
        sys.exit(130)
    except SIGTERMException:
        print(f"invrecon: terminated; {to_continue(sys.argv[1:])}", file=sys.stderr)
        sys.exit(143)
