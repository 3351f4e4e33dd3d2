"""A small Hydra program to sweep, and a PostgreSQL server for it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "program" / "app.py"


@dataclass
class Program:
    """Runs `app.py` in a directory."""

    folder: Path
    started: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(APP), *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        # `sweeps` contains hydra_plugins, if another checkout is installed.
        path = os.pathsep.join([str(ROOT), str(ROOT / "sweeps"), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **variables}

    def run(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    for process in program.started:
        with process:
            process.kill()  # no effect if it has ended


class PostgreSQL:
    """A server on the loopback interface that can be killed and restarted."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._run(
            "initdb",
            "-D",
            f"{folder}/data",
            "-A",
            "scram-sha-256",
            "-U",
            "sweeper",
            "--pwfile",
            f"{folder}/password",
            "-N",
        )
        self.start()

    def url(self, password: str | None = None) -> str:
        """Return the address. Without a password, libpq reads PGPASSWORD."""
        user = "sweeper" if password is None else f"sweeper:{password}"
        return f"postgresql://{user}@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        options = (
            f"-p {self._port} -c listen_addresses=127.0.0.1 -c fsync=off "
            f"-c unix_socket_directories={self._folder}"
        )
        data = f"{self._folder}/data"
        self._run("pg_ctl", "-D", data, "-l", f"{self._folder}/log", "-o", options, "-w", "start")

    def kill(self) -> None:
        self._run("pg_ctl", "-D", f"{self._folder}/data", "-m", "immediate", "-w", "stop")

    def _run(self, name: str, *arguments: str) -> None:
        # The server refuses to run as root.
        user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        subprocess.run(
            [*user, str(self._binaries / name), *arguments],
            cwd=self._folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )


PASSWORD = "a secret: with@signs"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = found[-1] if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("needs a PostgreSQL server's initdb and pg_ctl")
    pytest.importorskip("psycopg", reason="needs psycopg")
    folder = Path(tempfile.mkdtemp(prefix="postgresql"))
    (folder / "password").write_text(PASSWORD)
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    server = PostgreSQL(Path(initdb).parent, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", PASSWORD)
        patch.setenv("QUOTED_PASSWORD", quote(PASSWORD, safe=""))
        yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.kill()
    shutil.rmtree(folder)
