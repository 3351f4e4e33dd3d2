"""Run a function as a command: Hydra composes its configuration, errors become exit codes."""

import contextlib
import functools
import gc
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from hydra_plugins.bn_optuna import register
from omegaconf import DictConfig, OmegaConf

from bn_lightning.cli.command_parser import check_hydras_options
from bn_lightning.cli.error_line import FULL_ERROR, format_error, one_line_errors, print_error
from bn_lightning.cli.job import remove_empty_multirun, run_task
from bn_lightning.cli.run_lock import RunRefusedError
from bn_lightning.runs.directory import hydra_directory, run_directory, sweep_directory
from bn_lightning.runs.freed_memory import keep_freed_memory
from bn_lightning.runs.interruption import Interrupted, handle_signals, raise_interrupted
from bn_lightning.runs.machine import package_versions
from bn_lightning.sweeps.engine.environment import in_trial
from bn_lightning.sweeps.engine.passwords import refuse_typed_password
from bn_lightning.sweeps.engine.processes import called_as, is_called

_CONFIGURATIONS = "bn_lightning.conf"
_ONE_LINE = "BN_LIGHTNING_ONE_LINE"  # tells the ranks of a run that nobody asked for tracebacks


def hydra_command(task: Callable[[DictConfig], Any], config_name: str) -> Callable[[], None]:
    """Make a command of a function of a composed configuration.

    The command exits with 0; with 1 after an error, which it prints as one line on stderr
    (`HYDRA_FULL_ERROR=1` shows the traceback); with 130 or 143 after SIGINT or SIGTERM. In a
    multirun the sweeper handles errors. `--version` prints versions.

    Args:
        task: the function.
        config_name: the primary configuration in `bn_lightning.conf`.
    """
    register()
    for resolver in (
        run_directory,
        hydra_directory,
        sweep_directory,
        several_processes,
        devices_per_job,
    ):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True, use_cache=True)
    failures: list[Exception] = []
    run_job = _without_hydras_line(task, failures)
    hydra_main = hydra.main(f"pkg://{_CONFIGURATIONS}", config_name, version_base="1.3")(run_job)

    def run() -> None:
        refuse_typed_password(sys.argv[1:])
        check_hydras_options(sys.argv[1:])
        try:
            hydra_main()
        except Exception:
            remove_empty_multirun()
            raise
        if failures:
            raise failures.pop()

    @functools.wraps(task)
    def command() -> None:
        if "--version" in sys.argv[1:]:
            print(format_versions())
            return
        full_error = os.environ.get(FULL_ERROR)
        is_wanted = full_error == "1" and _ONE_LINE not in os.environ
        # Makes Hydra raise its errors instead of printing them over several lines.
        os.environ[FULL_ERROR] = "1"
        if not is_wanted:
            os.environ[_ONE_LINE] = "1"
        try:
            run_with_exit_code(run, full_error=is_wanted)
        finally:
            if full_error is None:
                del os.environ[FULL_ERROR]
            os.environ.pop(_ONE_LINE, None)

    return command


def call_command(
    task: Callable[[DictConfig], Any],
    config_name: str,
    overrides: Sequence[str],
    config_dir: str | Path | None = None,
    *,
    multirun: bool = False,
) -> Any:
    """Run the task of a command in this process, as the command does.

    Hydra's global state and logging are as before when it returns.

    Args:
        task: what `hydra_command` made a command of.
        config_name: as there.
        overrides: the arguments of the command.
        config_dir: its `--config-dir`.
        multirun: its `-m`.

    Returns:
        What Hydra returns: the sweeper's result of a multirun, else its `JobReturn`.

    Raises:
        ExperimentError: for any error of the task, of Hydra or of the sweeper.
        KeyboardInterrupt: SIGINT came.
        SystemExit: SIGTERM came.
    """
    composed, arguments = list(overrides), [*(["-m"] if multirun else []), *overrides]
    if config_dir is not None:
        folder = str(Path(config_dir).absolute())
        quoted = QuotedString(f"file://{folder}", Quote.single).with_quotes()
        composed.append(f"hydra.searchpath=[{quoted}]")
        arguments = ["--config-dir", folder, *arguments]
    failures: list[Exception] = []
    run_job = _without_hydras_line(task, failures)
    with contextlib.ExitStack() as stack:
        stack.enter_context(called_as(f"bn_lightning.{config_name}", arguments))
        stack.enter_context(one_line_errors())
        stack.enter_context(_logging_restored())
        stack.enter_context(hydra.initialize_config_module(_CONFIGURATIONS, version_base="1.3"))
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(handle_signals(raise_interrupted))
        refuse_typed_password(overrides)
        program: Any = GlobalHydra.instance().hydra
        try:
            result = (program.multirun if multirun else program.run)(config_name, run_job, composed)
        except Exception:
            remove_empty_multirun()
            raise
        except RunRefusedError as error:
            raise ValueError(str(error)) from None
        except Interrupted as interrupted:
            _end_as_python_does(interrupted.exit_code)
        except SystemExit as end:  # of a sweep that was asked to stop
            _end_as_python_does(end.code)
        if failures:
            raise failures.pop()
    return result


def _without_hydras_line(
    task: Callable[[DictConfig], Any], failures: list[Exception]
) -> Callable[[DictConfig], Any]:
    """Return the task with its errors in `failures`: Hydra prints a line above those it raises."""

    @functools.wraps(task)
    def run_job(config: DictConfig) -> Any:
        try:
            return run_task(lambda: task(config))
        except Exception as error:
            if in_sweep() or in_trial():
                # The sweeper shows the last line of the traceback, which Hydra's errors waste.
                error.add_note(format_error(error))
                raise
            failures.append(error)

    return run_job


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    """Restore what Hydra and `quiet_lightning` change: the root logger and filters of warnings."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for handler in root.handlers:
                if handler not in handlers:
                    handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)


def _end_as_python_does(exit_code: Any) -> NoReturn:
    if exit_code == 128 + signal.SIGINT:
        raise KeyboardInterrupt from None
    sys.exit(exit_code)


def format_versions() -> str:
    """Return the versions of bn_lightning, Python and the packages it builds on, one a line."""
    versions = package_versions()
    names = sorted(versions, key=lambda name: name != "bn-lightning")
    return "\n".join(f"{name} {versions[name]}" for name in names if versions[name] is not None)


def several_processes(devices: Any, strategy: str) -> bool:
    """Return whether a run starts processes of its own, for `hydra.sweeper.isolate`.

    Args:
        devices: a number, a list of numbers, or anything else that Lightning's Trainer takes.
        strategy: of the Trainer.
    """
    if "ddp" in strategy or "fsdp" in strategy or "deepspeed" in strategy:
        return True
    return devices not in (1, "1") and not (OmegaConf.is_list(devices) and len(devices) == 1)


def devices_per_job(accelerator: str, devices: Any) -> int | None:
    """Return how many GPUs a run needs, for `hydra.sweeper.devices_per_job`; None if it is open.

    Args:
        accelerator: of the Trainer.
        devices: as for `several_processes`.
    """
    if accelerator not in ("auto", "cuda", "gpu"):
        return 0
    count = int(devices) if str(devices).isdecimal() else None
    if count is None and OmegaConf.is_list(devices):
        return 0  # the list names devices that a worker's own choice would hide
    return count if accelerator != "auto" else None


def run_with_exit_code(body: Callable[[], Any], full_error: bool = False) -> None:
    """Run the body of a command, and end the process with an exit code if it fails.

    What it frees stays in the process (`keep_freed_memory`).

    Args:
        body: the body.
        full_error: let errors through, with their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Paths may contain bytes that are not UTF-8. Print them as they are.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="surrogateescape")
    keep_freed_memory()
    try:
        with handle_signals(raise_interrupted):
            body()
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except RunRefusedError as error:
        sys.exit(print_error(ValueError(str(error))))
    except Exception as error:
        if full_error:
            raise
        sys.exit(print_error(error))


def quiet_lightning() -> None:
    """Silence Lightning's tips, and warnings that its user can do nothing about.

    What is imported by then is left out of garbage collections, unless this process is another
    program: it lives as long as the process, and to look at it takes a third of a second each time,
    at the end of the process, too.
    """
    import lightning.pytorch  # noqa: F401  importing it sets the level of its log

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # their reports
    # Lightning 2.6 calls what torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # The budget and the log of a run count steps across epochs.
    warnings.filterwarnings("ignore", message="The number of training batches")
    # A resumed run may have other callbacks, for example none that stops it early.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
    # A resumed run writes to the folder of its checkpoints.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    if HydraConfig.initialized() and not is_called() and gc.get_freeze_count() == 0:
        gc.freeze()


def is_typed(key: str) -> bool:
    """Return whether an override of this command, or of this job of a multirun, sets a key."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return any(text.lstrip("+").startswith(f"{key}=") for text in overrides)


def in_sweep() -> bool:
    """Return whether this is one job of a Hydra multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
