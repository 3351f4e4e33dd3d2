"""Report a sweep, or runs side by side: `bn-report DIR [DIR ...]`.

DIR is a sweep's directory, a storage URL (with --study NAME), the folder of an earlier report (its
trials.csv and summary.json are enough), a run's directory, several of them, or a folder of runs.
Writes report.html, summary.json, trials.csv and figures/ into DIR, or into --output. Runs that
differ in seed alone are one arm. `bn-report --list DIR` lists the runs under DIR instead.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bn_lightning.cli.command import format_versions, run_with_exit_code
from bn_lightning.cli.command_parser import CommandParser
from bn_lightning.cli.error_line import FULL_ERROR
from bn_lightning.sweeps.analysis.columns import Columns
from bn_lightning.sweeps.analysis.run_list import list_runs
from bn_lightning.sweeps.analysis.tolerance import TRAINED
from bn_lightning.sweeps.report.write_report import ReportOptions, write_report

EXAMPLES = """\
examples:
  bn-report logs/mnist_bn/sweeps/quick
  bn-report RUN RUN --output comparison
  bn-report --list logs
"""


def main() -> None:
    """Run the command."""
    run_with_exit_code(_run, full_error=os.environ.get(FULL_ERROR) == "1")


def _run() -> None:
    parser = CommandParser(
        prog="bn-report",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=format_versions())
    parser.add_argument("sources", nargs="+", metavar="DIR", help="a sweep, or runs")
    parser.add_argument("--output", type=Path, help="folder to write to (default: DIR)")
    parser.add_argument("--list", action="store_true", help="list the runs under DIR, and stop")
    parser.add_argument("--study", help="name of the study, where a storage holds several")
    parser.add_argument("--lr", default="", metavar="KEY", help="parameter that is the rate")
    parser.add_argument("--init", default="", metavar="KEY", help="... the initialization")
    parser.add_argument("--seed", default="", metavar="KEY", help="... the seed")
    parser.add_argument("--arm", default=[], nargs="+", metavar="KEY", help="... the network's arm")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="report different data or budgets together"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="VALUE",
        help=f"accuracy at which a cell of a sweep has trained (default: {TRAINED}); of another "
        "metric no default, and at most VALUE where it is minimized",
    )
    given = parser.parse_intermixed_args()
    options = ReportOptions(
        output=given.output,
        study=given.study,
        columns=Columns(given.lr, given.init, tuple(given.arm), given.seed),
        allow_mixed=given.allow_mixed,
        threshold=given.threshold,
    )
    if given.list:
        print_runs(given.sources)
    else:
        write_report(given.sources, options)


def print_runs(folders: Sequence[str]) -> None:
    """Print a table of the runs under each folder."""
    for folder in folders:
        print(list_runs(Path(folder)))


if __name__ == "__main__":
    main()
