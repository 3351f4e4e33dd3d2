"""Train the jobs of a batch as stacks, for `hydra/launcher=bn_stack`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bn_lightning.cli.config_check import check_config
from bn_lightning.cli.error_line import format_error
from bn_lightning.cli.job import run_task
from bn_lightning.cli.run_table import print_run_table
from bn_lightning.runs.record import end_sentence, read_run, run_outcome
from bn_lightning.runs.run_log import RUN_LOG
from bn_lightning.sweeps.engine.environment import in_trial
from bn_lightning.sweeps.engine.stored_names import SECONDS

if TYPE_CHECKING:
    from bn_lightning.sweeps.engine.rungs import Rungs

# By the directory of a job that was trained: the rest of the job, which returns what `train` would.
_Ends = dict[Path, Callable[[], dict[str, Any]]]


def train_jobs(
    configs: Sequence[dict[str, Any]], size: int, rungs: "Rungs | None" = None
) -> list[Callable[[], dict[str, Any]] | None]:
    """Train jobs that can be stacked; print why the others will be trained one by one.

    Args:
        configs: of the jobs, resolved.
        size: most members of a stack.
        rungs: prunes the jobs, which are its trials, in their order; None prunes none.

    Returns:
        For each job a function that does the rest of it, and returns or raises what `train` would;
        None for a job that has to be trained alone.
    """
    from bn_lightning.cli.command import quiet_lightning
    from bn_lightning.stack.memory import StackSizeError
    from bn_lightning.stack.same_architecture import NotStackableError
    from bn_lightning.stack.stackable import stack_key

    quiet_lightning()
    groups: dict[str, list[dict[str, Any]]] = {}
    alone: dict[str, int] = {}
    ends: _Ends = {}
    places = {config["paths"]["output_dir"]: place for place, config in enumerate(configs)}
    for config in configs:
        try:
            check_config(config)
            groups.setdefault(stack_key(config), []).append(config)
        except NotStackableError as error:
            alone[error.reason] = alone.get(error.reason, 0) + 1
        except ValueError:
            pass  # the job raises it again
    for group in groups.values():
        whole, most = len(group), size
        while group:
            part = group[:most]
            own = [places[config["paths"]["output_dir"]] for config in part]
            try:
                if len(part) > 1:
                    reason = _train(part, ends, None if rungs is None else rungs.part(own))
                elif whole > 1:
                    reason = f"stacks of {most} leave no other job for it"
                else:
                    reason = "no other job of this batch differs in seeds and numbers only"
            except StackSizeError as error:
                if error.fits == 1:
                    alone[error.reason] = len(group)
                    break
                print(f"stacks of {error.fits} jobs, which fit into the free memory", flush=True)
                most = error.fits
                continue
            group = group[most:]
            if reason is not None:
                alone[reason] = alone.get(reason, 0) + len(part)
    for reason, count in alone.items():
        print(f"{count} job{'s' * (count > 1)} one by one: {reason}", flush=True)
    return [ends.get(Path(config["paths"]["output_dir"])) for config in configs]


def _train(configs: Sequence[dict[str, Any]], ends: _Ends, rungs: "Rungs | None") -> str | None:
    """Train one stack and add the ends of its jobs; return why it cannot be one, or None.

    Raises:
        StackSizeError: the members do not fit into memory.
    """
    from bn_lightning.stack.memory import StackSizeError
    from bn_lightning.stack.same_architecture import NotStackableError
    from bn_lightning.stack.training import StackTraining

    try:
        if configs[0]["trainer"].get("accelerator") == "cpu" and _has_convolutions(configs[0]):
            return "convolutions gain nothing in a stack on a CPU"
        training = StackTraining(configs, rungs)
    except StackSizeError:
        raise
    except NotStackableError as error:
        return error.reason
    except Exception as error:  # of one configuration, which raises it again in its own job
        return f"{type(error).__name__}: {error}"
    print(f"{len(configs)} jobs as one stack", flush=True)
    try:
        outcomes: Sequence[dict[str, Any] | Exception] = training.run()
    except Exception as error:
        # Those that had left the stack before have ended as they would without the error.
        outcomes = [
            error if member in training.members else run_outcome(member.record.content)
            for member in training.runs
        ]
    for member, outcome in zip(training.runs, outcomes, strict=True):
        if isinstance(outcome, dict):
            # The job's own time is that of this look-up.
            outcome = {**outcome, SECONDS: member.record.content["seconds"]}
        ends[member.directory] = partial(_end_job, member.record.content, member.directory, outcome)
    return None


def _has_convolutions(config: dict[str, Any]) -> bool:
    from hydra.utils import instantiate
    from torch.nn.modules.conv import _ConvNd

    modules = instantiate(config["model"]).modules()
    return any(isinstance(module, _ConvNd) for module in modules)


def _end_job(
    record: dict[str, Any], directory: Path, outcome: dict[str, Any] | Exception
) -> dict[str, Any]:
    def rest() -> dict[str, Any]:
        if isinstance(outcome, Exception):
            raise outcome
        RUN_LOG.info("seed %d, trained in a stack: %s", record["seed"], end_sentence(record))
        if record["status"] == "pruned":
            from bn_lightning.sweeps.engine.outcome import PrunedInBatch

            told = {key: outcome[key] for key in ("pruned_at", "prune_reason", SECONDS)}
            raise PrunedInBatch(outcome["prune_reason"], told)
        if not in_trial():
            if record["config"]["extras"]["figures"]:
                from bn_lightning.sweeps.report.run_figures import draw_run

                draw_run(directory)
            print_run_table(read_run(directory), directory)
        return outcome

    try:
        return run_task(rest)
    except Exception as error:
        error.add_note(format_error(error))
        raise
