"""Put what is claimed for BatchNorm to the test: `bn-claims [NAME ...] [KEY=VALUE ...]`.

Without a NAME all claims are measured. budget=quick takes minutes and budget=full hours; seeds=N
sets the number of seeds, and n_jobs=N that of processes, one per core by default. Any other
KEY=VALUE is an override of bn-train's configuration, for all networks. Writes trials.csv,
summary.json, figures/, claims.md and claims.html to logs/claims/BUDGET or to --output. The same
command goes on where it was interrupted.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bn_lightning.cli.command import format_versions, run_with_exit_code
from bn_lightning.cli.command_parser import CommandParser
from bn_lightning.cli.error_line import FULL_ERROR

_EXAMPLES = """\
examples:
  bn-claims
  bn-claims scale_invariance depth_plain seeds=10
  bn-claims depth_plain budget=full data=digits
"""


def main() -> None:
    """Run the command."""
    run_with_exit_code(_run, full_error=os.environ.get(FULL_ERROR) == "1")


def _run() -> None:
    parser = CommandParser(
        prog="bn-claims",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=format_versions())
    parser.add_argument("arguments", nargs="*", metavar="NAME|KEY=VALUE", help="see above")
    parser.add_argument("--output", type=Path, help="folder to write to")
    parser.add_argument("--list", action="store_true", help="list the claims, and stop")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="add to results of other versions or options"
    )
    given = parser.parse_intermixed_args()
    if given.list:
        print_claims()
    else:
        _measure_claims(given)


def print_claims() -> None:
    """Print the name and the sentence of each claim."""
    from bn_lightning.claims.registry import find_claims

    for claim in find_claims():
        print(f"{claim.name}: {claim.sentence}")


def _measure_claims(given: argparse.Namespace) -> None:
    from bn_lightning.claims.run_claims import LedgerOptions, run_claims

    names, values, overrides = _sorted_arguments(given.arguments)
    options = LedgerOptions(
        names=names,
        budget=values.get("budget", "quick"),
        seeds=_integer("seeds", values),
        overrides=overrides,
        output=given.output,
        allow_mixed=given.allow_mixed,
        n_jobs=_integer("n_jobs", values),
    )
    run_claims(options)


def _sorted_arguments(
    arguments: Sequence[str],
) -> tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """Return the names of claims, this command's own keys, and Hydra's overrides."""
    names = tuple(text for text in arguments if "=" not in text and not text.startswith("~"))
    pairs = [text for text in arguments if text not in names]
    own = {key: value for key, _, value in (text.partition("=") for text in pairs) if key in _OWN}
    return names, own, tuple(text for text in pairs if text.partition("=")[0] not in _OWN)


_OWN = ("budget", "seeds", "n_jobs")


def _integer(name: str, values: Mapping[str, str]) -> int | None:
    try:
        return int(values[name]) if name in values else None
    except ValueError:
        raise ValueError(
            f"expected `{name}` to be an integer, got {values[name]!r}; correct it"
        ) from None


if __name__ == "__main__":
    main()
