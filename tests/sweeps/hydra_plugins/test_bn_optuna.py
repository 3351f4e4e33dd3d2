"""Sweeps of a small program, started from the command line."""

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from html import escape

import optuna
import pytest
from omegaconf import OmegaConf

from bn_lightning.sweeps.engine.storage import open_storage, storage_url
from bn_lightning.sweeps.engine.sweep_error import SweepError
from bn_lightning.sweeps.report.write_report import write_report

GRID = ("-m", "x=0,1,3", "y=range(2)", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=null")


def study_in(folder, name="demo"):
    storage = open_storage(storage_url("journal", folder), 5)
    return optuna.load_study(study_name=name, storage=storage)


def states(folder, name="demo"):
    return [trial.state.name for trial in study_in(folder, name).trials]


def states_so_far(folder):
    """The same of a sweep that may not have begun."""
    try:
        return states(folder)
    except KeyError:  # no study yet
        return []


class TestASweep:
    def test_from_its_beginning_to_its_end(self, program):
        done = program.run(*GRID)
        assert (done.returncode, done.stderr) == (0, "")
        sweep = program.folder / "sweep"
        lines = done.stdout.splitlines()
        assert lines[0] == f"sweep demo: 0 of 6 trials done, in {sweep}"
        assert lines[1].startswith("trial 0: 1  x=0 y=0 ")
        assert lines[1].endswith("[1/6]")
        assert lines[5].startswith("trial 4: 4 diverged  x=3 y=0 ")
        assert lines[7] == "6 of 6 trials: 6 complete (2 of them diverged), 0 pruned, 0 failed"
        assert lines[8] == "best: 0 in trial 2  x=1 y=0"
        assert lines[9].strip() == f"{sweep}/2"
        assert lines[10].strip() == f"python {program.command()[1]} x=1 y=0"
        assert lines[11] == str(sweep)
        results = OmegaConf.load(sweep / "optimization_results.yaml")
        assert results == {"name": "optuna", "best_params": {"x": 1, "y": 0}, "best_value": 0.0}
        assert OmegaConf.load(sweep / "2" / ".hydra" / "overrides.yaml") == ["x=1", "y=0"]
        typed = f"python {program.command()[1]} {shlex.join(GRID)}"
        assert study_in(sweep).user_attrs["sweep:command"] == typed
        page = write_report([str(sweep)]).read_text()
        assert f"<code>{escape(typed)}</code>" in page and "bn_lightning.train" not in page
        attributes = study_in(sweep).trials[5].user_attrs
        assert attributes["directory"] == f"{sweep}/5"
        assert attributes["diverged"] is True
        assert attributes["size"] == 3
        assert attributes["seconds"] >= 0

    def test_the_same_command_resumes(self, program):
        first = program.run(*GRID[:3], "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=4")
        second = program.run(*GRID)
        assert (first.returncode, second.returncode) == (0, 0)
        assert "4 of 6 trials done" in second.stdout
        assert "trial 3" not in second.stdout.partition("best")[0]
        assert states(program.folder / "sweep") == ["COMPLETE"] * 6
        trials = study_in(program.folder / "sweep").trials
        assert len({tuple(trial.params.values()) for trial in trials}) == 6

    def test_hydras_own_keys_say_where_a_sweep_and_its_trials_are(self, program):
        """The same command resumes it there, and `raise_once` finds what a trial left there."""
        arguments = (
            *("-m", "x=0,1", "hydra/sweeper/sampler=grid", "hydra.sweeper.dir=${hydra.sweep.dir}"),
            *("hydra.sweep.dir=there", "hydra.sweep.subdir=${hydra.job.override_dirname}"),
        )
        done = program.run(*arguments, "hydra.sweeper.n_jobs=2")
        assert done.returncode == 0, done.stderr
        folders = {path.parent.name for path in (program.folder / "there").glob("*/outcome.json")}
        assert folders == {"x=0", "x=1"}
        trials = study_in(program.folder / "there").trials
        directories = {trial.user_attrs["directory"] for trial in trials}
        assert directories == {str(program.folder / "there" / name) for name in folders}
        assert "2 of 2 trials done" in program.run(*arguments).stdout

    @pytest.mark.slow
    def test_edges_are_searched_by_two_workers_and_after_a_kill(self, program):
        """The loss (x - 1)^2 + y reaches 5 at x = 3.24 for y = 0, and at x = 3 for y = 1."""
        arguments = (
            *("-m", "x=1,2,4,8", "y=0,1", "seconds=0.2", "hydra.sweeper.n_jobs=2"),
            *("hydra/sweeper/sampler=edges", "hydra.sweeper.n_trials=null"),
            *("hydra.sweeper.sampler.axis=x", "hydra.sweeper.sampler.resolution=0.08"),
        )
        threshold = "hydra.sweeper.sampler.threshold=5"
        first = program.start(*arguments, threshold)
        while first.poll() is None and len(states_so_far(program.folder / "sweep")) < 9:
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        done = program.run(*arguments, threshold)
        assert done.returncode == 0, done.stderr
        assert "12 of 12 trials: 12 complete" in done.stdout
        trials = study_in(program.folder / "sweep").trials
        complete = [t.params for t in trials if t.state.name == "COMPLETE"]
        assert sorted((p["y"], p["x"]) for p in complete) == sorted(
            (y, x) for y in (0, 1) for x in (1, 2, 4, 8, 2.8284, 3.3636)
        )
        other = program.run(*arguments, "hydra.sweeper.sampler.threshold=4")
        assert "the study has sampler.threshold=5, this command sampler.threshold=4" in other.stderr

    def test_a_pruner_is_refused_where_results_choose_the_trials(self, program):
        edges = ("hydra/sweeper/sampler=edges", "hydra.sweeper.sampler.axis=x")
        pruner = ("hydra.sweeper.n_trials=null", "hydra/sweeper/pruner=median")
        done = program.run("-m", "x=1,2", *edges, *pruner)
        assert done.returncode == 1
        assert "got MedianPruner; choose hydra/sweeper/pruner=none" in done.stderr
        assert not (program.folder / "sweep").exists()

    @pytest.mark.slow
    def test_fresh_makes_another_study_beside(self, program):
        program.run(*GRID)
        assert program.run(*GRID, "hydra.sweeper.restart=fresh").returncode == 0
        resumed = program.run(*GRID)
        assert "sweep demo-2: 6 of 6" in resumed.stdout
        assert states(program.folder / "sweep") == ["COMPLETE"] * 6
        assert states(program.folder / "sweep-2", "demo-2") == ["COMPLETE"] * 6

    def test_params_conditions_and_several_directions(self, program):
        done = program.run(
            "-m",
            "+hydra.sweeper.params.kind='deep,flat'",
            "hydra.sweeper.custom_search_space=__main__.depth_of_deep",
            "hydra/sweeper/sampler=brute_force",
            "hydra.sweeper.direction=[minimize,maximize]",
            "hydra.sweeper.metric=[loss,size]",
        )
        assert done.returncode == 0, done.stderr
        trials = study_in(program.folder / "sweep").trials
        assert sorted(str(trial.params) for trial in trials) == [
            "{'kind': 'deep', 'depth': 1}",
            "{'kind': 'deep', 'depth': 2}",
            "{'kind': 'flat'}",
        ]
        results = OmegaConf.load(program.folder / "sweep" / "optimization_results.yaml")
        assert results.solutions == [{"params": {"kind": "flat"}, "values": [1.0, 0.0]}]

    def test_pruning_by_the_study(self, program):
        """A trial reports and is pruned through the study's storage and the sweep's pruner."""
        done = program.run(
            "-m",
            "x=range(8)",
            "act=report",
            "hydra/sweeper/sampler=grid",
            "hydra.sweeper.n_trials=null",
            "hydra/sweeper/pruner=median",
            "hydra.sweeper.pruner.n_startup_trials=2",
        )
        assert done.returncode == 0, done.stderr
        trials = study_in(program.folder / "sweep").trials
        assert [t.state.name for t in trials] == ["COMPLETE"] * 2 + ["PRUNED"] * 6
        assert trials[5].intermediate_values == {1: 5.0}
        assert "6 pruned" in done.stdout


class TestFailures:
    def test_all_failed(self, program):
        done = program.run(*GRID, "act=raise")
        assert done.returncode == 1
        assert "got 6 of 6" in done.stderr
        assert "RuntimeError: asked to fail" in done.stderr
        assert "a larger hydra.sweeper.max_retries" in done.stderr
        assert "Traceback" not in done.stderr
        assert states(program.folder / "sweep") == ["FAIL"] * 12
        assert study_in(program.folder / "sweep").trials[0].user_attrs["error"].endswith("to fail")

    def test_an_error_does_not_end_the_sweep(self, program):
        done = program.run(*GRID, "act=raise_once")
        assert done.returncode == 0, done.stderr
        assert "trial 0: failed (RuntimeError: asked to fail once)" in done.stdout
        assert states(program.folder / "sweep") == ["FAIL"] + ["COMPLETE"] * 6

    def test_what_is_no_number(self, program):
        acts = {"none": "got None", "text": "got 'text'", "two": "got 2", "not_a_number": "got nan"}
        done = program.run("-m", f"act={','.join(acts)}", "hydra/sweeper/sampler=grid")
        assert done.returncode == 1
        assert "got 4 of 4" in done.stderr
        assert "restart=fresh" in done.stderr and "max_retries" not in done.stderr
        errors = [t.user_attrs["error"] for t in study_in(program.folder / "sweep").trials]
        for error, words in zip(errors, acts.values(), strict=True):
            assert words in error

    def test_a_share_of_failures_is_allowed(self, program):
        done = program.run(
            "-m",
            "act=raise,return",
            "hydra/sweeper/sampler=grid",
            "hydra.sweeper.max_retries=0",
            "hydra.sweeper.max_failure_rate=0.5",
        )
        assert done.returncode == 0, done.stderr
        assert "1 complete (0 of them diverged), 0 pruned, 1 failed" in done.stdout

    @pytest.mark.parametrize(
        "how", [(), pytest.param(("hydra.sweeper.n_jobs=2",), marks=pytest.mark.slow)], ids=str
    )
    def test_a_sweep_whose_first_trials_all_fail_is_given_up(self, program, how):
        command = ("-m", "act=raise", "hydra/sweeper/sampler=grid", *how)
        points = f"x={','.join(map(str, range(40)))}"
        done = program.run(*command, points)
        assert done.returncode == 1
        failed = states(program.folder / "sweep").count("FAIL")
        assert f"0 pruned, 0 failed, {failed} to be tried again" in done.stdout
        assert "expected one of the first 1" in done.stderr
        assert "RuntimeError: asked to fail (see " in done.stderr
        assert "the same command tries again" in done.stderr
        assert 10 <= failed <= 14
        # The same command tries the next ones.
        assert program.run(*command, points).returncode == 1
        assert 20 <= states(program.folder / "sweep").count("FAIL") <= 28

    def test_a_sweep_that_may_fail_goes_on(self, program):
        done = program.run(
            *("-m", "act=raise", "hydra/sweeper/sampler=grid", "hydra.sweeper.max_retries=0"),
            *(f"x={','.join(map(str, range(12)))}", "hydra.sweeper.max_failure_rate=1"),
        )
        assert done.returncode == 0, done.stderr
        assert states(program.folder / "sweep") == ["FAIL"] * 12

    @pytest.mark.slow
    def test_a_worker_that_dies_of_its_trial(self, program):
        """The trial is lost after its retries, and the other trials complete."""
        done = program.run(
            "-m", "act=exit,return", "x=0,1", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=2"
        )
        assert done.returncode == 1
        assert "got 2 of 4" in done.stderr
        found = states(program.folder / "sweep")
        assert (found.count("COMPLETE"), found.count("FAIL")) == (2, 4)

    @pytest.mark.slow
    def test_workers_that_cannot_start(self, program):
        done = program.run(*GRID, "hydra.sweeper.n_jobs=2", NO_WORKER_STARTS="1")
        assert done.returncode == 1
        assert "expected workers" in done.stderr
        assert "a library is missing" in done.stderr
        assert "Traceback" not in done.stderr


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("x=1",), "nothing to sweep"),
            (("x=1,2", "hydra/sweeper/sampler=nope"), "tpe"),
            (("x=1,2", "hydra.sweeper.sampler._target_=nope.Nope"), "one of Optuna's samplers"),
            (("no.such.key=1,2",), "no.such.key"),
            (("x=1,2", "hydra.sweeper.direction=up"), "minimize or maximize, got up"),
            (("x=1,2", "hydra.sweep.subdir=same"), "`hydra.sweep.subdir` to differ"),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_it_is_refused_before_anything_is_written(self, program, arguments, words):
        done = program.run("-m", *arguments)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert not (program.folder / "sweep" / "journal.log").exists()

    def test_another_sweep_in_the_same_place(self, program):
        program.run("-m", "x=0,1", "hydra/sweeper/sampler=grid")
        done = program.run("-m", "x=0,1", "hydra/sweeper/sampler=grid", "seconds=0.001")
        assert done.returncode == 1
        assert "the study demo to have the same overrides" in done.stderr
        assert "restart=fresh" in done.stderr
        done = program.run("-m", "x=0,1,2", "hydra/sweeper/sampler=grid")
        assert "the study has x=0,1, this command x=0,1,2; repeat" in done.stderr
        assert states(program.folder / "sweep") == ["COMPLETE"] * 2

    @pytest.mark.slow
    def test_an_edited_file_of_the_configuration(self, program):
        """All trials of a study have the same configuration, typed or from a file."""
        kept = program.folder / "kept" / "sweep" / "mine.yaml"
        kept.parent.mkdir(parents=True)
        arguments = ("-m", "x=0,1", "hydra/sweeper/sampler=grid", "+sweep=mine")
        arguments = (*arguments, f"hydra.searchpath=[file://{program.folder}/kept]")
        kept.write_text("# @package _global_\ny: 1\n")
        assert program.run(*arguments).returncode == 0
        again = program.run(*arguments, "hydra.sweeper.n_jobs=2")
        assert "2 of 2 trials done" in again.stdout, again.stderr
        kept.write_text("# @package _global_\ny: 2\n")
        done = program.run(*arguments)
        assert done.returncode == 1
        assert "has y=1, this command y=2; repeat" in done.stderr
        assert program.run(*arguments, "hydra.sweeper.restart=fresh").returncode == 0

    @pytest.mark.slow
    def test_a_torn_journal(self, program):
        program.run(*GRID)
        journal = program.folder / "sweep" / "journal.log"
        torn = journal.read_bytes()[:-9]
        journal.write_bytes(torn)
        done = program.run(*GRID)
        assert done.returncode == 1
        assert "5 finished trials" in done.stderr
        assert journal.read_bytes() == torn

    def test_a_password_is_neither_taken_nor_written(self, program):
        done = program.run("-m", "x=0,1", "hydra.sweeper.storage=postgresql://u:geheim@h/d")
        assert done.returncode == 1
        assert "`storage` to take its password" in done.stderr
        assert "geheim" not in done.stderr + done.stdout
        for path in program.folder.rglob("*"):
            assert path.is_dir() or b"geheim" not in path.read_bytes()

    def test_a_password_does_not_reach_the_trials(self, program, monkeypatch):
        monkeypatch.setenv("STORAGE", "postgresql://u:geheim@127.0.0.1:1/d")
        done = program.run(
            "-m",
            "x=0,1",
            "+db=${oc.env:STORAGE}",
            "hydra.sweeper.storage=${db}",
            "hydra.sweeper.storage_patience=0.1",
        )
        assert done.returncode == 1
        assert "`db` to contain no password" in done.stderr
        assert "geheim" not in done.stderr + done.stdout


FILES_OF_HYDRA = ["config.yaml", "hydra.yaml", "overrides.yaml"]


class TestParallel:
    def test_worker_processes(self, program):
        """Each process runs several trials, and sees GPUs of its own."""
        devices = "GPU-8f3a-1,MIG-b"
        done = program.run(
            *GRID, "hydra.sweeper.n_jobs=2", "seconds=0.3", CUDA_VISIBLE_DEVICES=devices
        )
        assert done.returncode == 0, done.stdout + done.stderr
        trials = study_in(program.folder / "sweep").trials
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
        seen = {trial.user_attrs["pid"]: trial.user_attrs["devices"] for trial in trials}
        assert sorted(seen.values()) == devices.split(",")
        assert os.getpid() not in {trial.user_attrs["pid"] for trial in trials}
        logs = sorted(path.name for path in (program.folder / "sweep" / "workers").iterdir())
        assert logs == ["0.log", "1.log"]

    def test_more_devices_than_there_are(self, program):
        more = ("hydra.sweeper.n_jobs=2", "hydra.sweeper.devices_per_job=3")
        done = program.run(*GRID, *more, CUDA_VISIBLE_DEVICES="1,2")
        assert done.returncode == 1 and "devices_per_job` to be at most 2" in done.stderr
        assert not (program.folder / "sweep").exists()

    @pytest.mark.slow
    def test_several_commands(self, program):
        """Started at the same time, before the study exists."""
        commands = [program.start(*GRID, "seconds=0.2") for _ in range(3)]
        outputs = [command.communicate(timeout=120)[0] for command in commands]
        assert [command.returncode for command in commands] == [0, 0, 0], outputs
        trials = study_in(program.folder / "sweep").trials
        assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
        assert len({tuple(trial.params.values()) for trial in trials}) == 6

    @pytest.mark.slow
    def test_a_grpc_proxy(self, program):
        pytest.importorskip("grpc", reason="needs grpcio")
        pytest.importorskip("google.protobuf", reason="needs protobuf")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve = (
            "import optuna\n"
            "backend = optuna.storages.journal.JournalFileBackend('proxy.log')\n"
            "storage = optuna.storages.JournalStorage(backend)\n"
            f"optuna.storages.run_grpc_proxy_server(storage, host='127.0.0.1', port={port})"
        )
        proxy = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", serve],
            cwd=program.folder,
            env=program.environment(),
        )
        try:
            # The sweep waits until the proxy answers.
            done = program.run(
                *GRID, "hydra.sweeper.n_jobs=2", f"hydra.sweeper.storage=grpc://127.0.0.1:{port}"
            )
        finally:
            proxy.kill()
            proxy.wait()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "6 of 6 trials: 6 complete" in done.stdout

    def test_a_launcher_of_stacks_prepares_batches_in_each_worker(self, program):
        """A worker that dies in one is replaced, and its trials count as interrupted."""
        done = program.run(
            *GRID,
            *("hydra/launcher=_bn_stack", "hydra.launcher.prepare=__main__.prepare"),
            *("hydra.launcher.size=7", "hydra.launcher.batch=2"),
            "hydra.sweeper.n_jobs=2",
            "hydra.sweeper.max_retries=0",
            DIE_IN_BATCH="1",
        )
        assert done.returncode == 0, done.stderr
        found = states(program.folder / "sweep")
        assert found.count("COMPLETE") == 6 and found.count("FAIL") in (1, 2)
        lines = (program.folder / "prepared").read_text().splitlines()
        assert all(line.startswith("7 [") for line in lines)
        assert sum(line.count(",") + 1 for line in lines) == 6
        for trial in study_in(program.folder / "sweep").trials:
            if trial.state.name == "COMPLETE":
                assert trial.user_attrs.get("computed", False) == (trial.params["x"] == 0)
                hydra = program.folder / "sweep" / str(trial.number) / ".hydra"
                assert sorted(path.name for path in hydra.iterdir()) == FILES_OF_HYDRA

    def test_a_launcher_of_stacks_prunes_batches(self, program):
        """Of four trials one is kept, of all eight two, whatever the order of a batch."""
        done = program.run(
            *("-m", "x=6,1,5,2,7,0,4,3", "hydra/sweeper/sampler=grid"),
            *("hydra/sweeper/pruner=successive_halving", "hydra.sweeper.pruner.min_resource=1"),
            *("hydra/launcher=_bn_stack", "hydra.launcher.prepare=__main__.prepare"),
            *("hydra.launcher.size=7", "hydra.launcher.batch=4"),
        )
        assert done.returncode == 0, done.stderr
        trials = study_in(program.folder / "sweep").trials
        assert [t.params["x"] for t in trials if t.state.name == "COMPLETE"] == [1, 0]
        pruned = [t for t in trials if t.state.name == "PRUNED"]
        assert len(pruned) == 6 and all(t.user_attrs["pruned_at"] == 1 for t in pruned)

    def test_a_launcher_of_stacks_leaves_trials_of_other_pruners_alone(self, program):
        done = program.run(
            *("-m", "x=0,1", "hydra/sweeper/sampler=grid"),
            "hydra.sweeper.pruner={_target_:optuna.pruners.SuccessiveHalvingPruner}",
            *("hydra/launcher=_bn_stack", "hydra.launcher.prepare=__main__.prepare"),
            *("hydra.launcher.size=7", "hydra.launcher.batch=2"),
        )
        assert done.returncode == 0, done.stderr
        assert not (program.folder / "prepared").exists()
        assert "one by one" in done.stdout and "SuccessiveHalvingPruner" in done.stdout

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("times", "code", "state"),
        [(1, 130, "COMPLETE"), (2, -signal.SIGINT, "FAIL")],
        ids=["once", "twice"],
    )
    def test_ctrl_c_in_a_batch(self, program, times, code, state):
        """Once lets the batch end; twice ends at once, and no trial counts as failed."""
        given = (
            *GRID,
            *("hydra/launcher=_bn_stack", "hydra.launcher.prepare=__main__.prepare"),
            *("hydra.launcher.batch=2", "hydra.sweeper.max_retries=0"),
        )
        first = program.run(*given, CTRL_C=str(times))
        assert first.returncode == code, first.stdout + first.stderr
        found = states(program.folder / "sweep")
        assert [each for each in found if each != "WAITING"] == [state] * 2
        again = program.run(*given)
        assert again.returncode == 0, again.stdout + again.stderr
        assert states(program.folder / "sweep").count("COMPLETE") == 6

    @pytest.mark.slow
    @pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
    def test_launchers(self, program, launcher):
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
        done = program.run(
            *GRID, f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=3", "act=raise_once"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        trials = study_in(program.folder / "sweep").trials
        assert [t.state.name for t in trials].count("COMPLETE") == 6
        for trial in trials:
            outcome = json.loads(
                (program.folder / "sweep" / str(trial.number) / "outcome.json").read_text()
            )
            assert outcome["state"] == trial.state.name
        assert len({t.user_attrs["pid"] for t in trials if "pid" in t.user_attrs}) >= 2

    @pytest.mark.slow
    def test_a_process_for_a_trial(self, program):
        """The trial's configuration selects it."""
        done = program.run(
            "-m", "x=0,1", "y=0,1", "hydra/sweeper/sampler=grid", "hydra.sweeper.isolate='${y}'",
            "act=raise_once",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        trials = study_in(program.folder / "sweep").trials
        isolated = [t for t in trials if t.params["y"] and t.state.name == "COMPLETE"]
        here = [t for t in trials if not t.params["y"] and t.state.name == "COMPLETE"]
        assert len({t.user_attrs["pid"] for t in isolated}) == len(isolated) == 2
        assert len({t.user_attrs["pid"] for t in here}) == 1
        assert (program.folder / "sweep" / "1" / "process.log").exists()

    @pytest.mark.slow
    def test_an_isolated_trial_that_fails(self, program):
        done = program.run(
            "-m", "act=raise,exit,none", "hydra/sweeper/sampler=grid", "hydra.sweeper.isolate=true",
            "hydra.sweeper.max_retries=0",
        )  # fmt: skip
        assert done.returncode == 1
        errors = [t.user_attrs["error"] for t in study_in(program.folder / "sweep").trials]
        assert errors[0].endswith("RuntimeError: asked to fail")
        assert errors[1].endswith("the trial's process ended: exit code 3")
        assert "a number, got None" in errors[2]


def wait_until_one_runs(program, seconds=60):
    sweep, end = program.folder / "sweep", time.monotonic() + seconds
    while True:
        with suppress(KeyError):  # the journal exists before the study
            if (sweep / "journal.log").exists() and "RUNNING" in states(sweep):
                return
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
class TestCtrlC:
    def test_once_lets_running_trials_end(self, program):
        arguments = (*GRID, "seconds=1", "hydra.sweeper.n_jobs=2")
        process = program.start(*arguments)
        wait_until_one_runs(program)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        assert "the same command resumes" in output
        found = states(program.folder / "sweep")
        assert set(found) == {"COMPLETE", "WAITING"}
        assert 1 <= found.count("COMPLETE") <= 3
        again = program.run(*arguments)
        assert again.returncode == 0, again.stdout + again.stderr
        assert states(program.folder / "sweep") == ["COMPLETE"] * 6

    @pytest.mark.parametrize("n_jobs", [1, 2])
    def test_twice_ends_at_once(self, program, n_jobs):
        arguments = ("-m", "x=0,1", "hydra/sweeper/sampler=grid", f"hydra.sweeper.n_jobs={n_jobs}")
        process = program.start(*arguments, "seconds=60")
        wait_until_one_runs(program)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=50)
        assert time.monotonic() - started < 40
        assert process.returncode in (1, 130, -signal.SIGINT), output
        found = study_in(program.folder / "sweep").trials
        assert {trial.state.name for trial in found} <= {"FAIL", "WAITING"}
        failed = [trial for trial in found if trial.state.name == "FAIL"]
        assert failed
        assert all(trial.user_attrs["interrupted"] for trial in failed)


class TestRecordedTask:
    """The outcome is kept in memory if the disk is full."""

    def test_in_memory(self, monkeypatch, tmp_path, caplog):
        from hydra_plugins.bn_optuna import _trial_runner

        def full(self, directory):
            raise OSError(28, "No space left on device")

        job = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
        monkeypatch.setattr(_trial_runner.HydraConfig, "get", lambda: job.hydra)
        monkeypatch.setattr(_trial_runner.Outcome, "write", full)
        recorded = _trial_runner.RecordedTask(lambda config: {"loss": 0.5}, ["loss"], 1)
        assert recorded(job) == {"loss": 0.5}
        assert recorded.outcome.values == [0.5]
        assert "only in the study: [Errno 28]" in caplog.text


SETTINGS = {
    "sampler": {"_target_": "optuna.samplers.RandomSampler"},
    "pruner": None,
    "params": None,
    "custom_search_space": None,
    "check": None,
    "direction": "minimize",
    "metric": None,
    "n_trials": 1,
    "n_jobs": 1,
    "devices_per_job": None,
    "isolate": False,
    "storage": "journal",
    "study_name": "s",
    "dir": "d",
    "restart": "resume",
    "max_failure_rate": 0.0,
    "max_retries": 1,
    "heartbeat": 10,
    "stale_after": 120,
    "storage_patience": 600,
}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("direction", ["minimize", "up"], "minimize or maximize, got up"),
        ("metric", ["a", "b"], "a name for each of 1 directions"),
        ("restart", "new", "resume or fresh, got new"),
        ("n_trials", -1, "integer of at least 1, got -1"),
        ("n_trials", 0, "integer of at least 1, got 0"),
        ("n_trials", 1.5, "integer of at least 1, got 1.5"),
        ("n_jobs", 0, "integer of at least 1, got 0"),
        ("n_jobs", None, "integer of at least 1, got None"),
        ("devices_per_job", -1, "null or an integer of at least 0, got -1"),
        ("sampler", "foo", "an option of hydra/sweeper/sampler, got 'foo'"),
        ("pruner", "foo", "an option of hydra/sweeper/pruner, got 'foo'"),
        ("params", "foo", "a mapping from keys to values, got 'foo'"),
        ("metric", 1, "a name, a list of names or null, got 1"),
        ("isolate", "x", "true or false, got 'x'"),
        ("storage", 1, "journal or a URL, got 1"),
        ("study_name", None, "a text, with a number in quotes, got None"),
        ("dir", 7, "a path, got 7"),
        ("max_retries", "x", "an integer, got 'x'"),
        ("heartbeat", "x", "a number of seconds, got 'x'"),
        ("max_failure_rate", 1.5, "from 0 to 1, got 1.5"),
        ("max_failure_rate", "seven", "from 0 to 1, got seven"),
    ],
)
def test_settings(key, value, words):
    from hydra_plugins.bn_optuna._settings import Settings

    assert Settings(**SETTINGS).directions == ["minimize"]
    with pytest.raises(SweepError, match=f"`{key}` .*{words}"):
        Settings(**{**SETTINGS, key: value})


def test_a_check_that_is_no_function():
    from hydra_plugins.bn_optuna._settings import Settings

    assert Settings(**SETTINGS).check_of_trial() is None
    assert Settings(**{**SETTINGS, "check": "math.isfinite"}).check_of_trial() is math.isfinite
    with pytest.raises(SweepError, match="`check` .*, got math.nope"):
        Settings(**{**SETTINGS, "check": "math.nope"}).check_of_trial()
