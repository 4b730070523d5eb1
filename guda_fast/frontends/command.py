"""What the commands of the frontends share: their execution options, and how errors reach the user."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from guda_fast.errors import MENDABLE
from guda_fast.forward import PLANS, Choice
from guda_fast.prepare import Execution, Prepared

INTERRUPTED = 130


def add_execution_options(parser: argparse.ArgumentParser, precision: str, precisions: Sequence[str]) -> None:
    """How forwards are executed; the scripts have but some of these."""
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--noise",
        choices=("contract", "reference"),
        default="contract",
        help="contract: guda_fast's own noise, which depends on the image alone; reference: the script's own, which "
        "gives its CSV [contract]",
    )
    group.add_argument("--precision", choices=precisions, default=precision, help=f"of the forwards [{precision}]")
    group.add_argument(
        "--allow_lossy", action="store_true", help="go on where the precision gives other scores than fp32"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... [CUDA where there is one]")
    group.add_argument("--plan", choices=PLANS, default="auto", help="how models are run [auto]")
    group.add_argument(
        "--skip-missing",
        "--skip_missing",
        action="store_true",
        help="leave groups whose model is missing out of the CSV, instead of stopping",
    )


def execution(options: argparse.Namespace, rows: int | None) -> Execution:
    """The execution options as `prepare` takes them; rows: of a forward, None for what suits model and device."""
    return Execution(
        batch_size=rows,
        device=options.device,
        precision=options.precision,
        plan=options.plan,
        allow_lossy=options.allow_lossy,
    )


def print_execution(prepared: Prepared, choices: Sequence[Choice]) -> None:
    """Which plan ran, and what the precision costs, where that was looked at."""
    for choice in choices:
        print(f"plan: {choice}")
    if prepared.audit is not None:
        print(f"precision {prepared.engine.precision.name}: {prepared.audit}")


def without_missing(found: dict[str, Path], missing: dict[str, Path], skip: bool) -> dict[str, Path]:
    """The models that are there.

    found, missing: paths by group; those of missing ones are where a model was looked for
    Raises FileNotFoundError naming the first missing path unless ``skip``, and where nothing is left.
    """
    for group, path in missing.items():
        if not skip:
            raise FileNotFoundError(
                f"{path}: must be the model of group {group!r}, found no such file or folder; pass --skip-missing to "
                "leave such groups out of the CSV"
            )
        print(f"skipped: group {group!r} has no model at {path}, and is not in the CSV")
    if not found:
        raise FileNotFoundError(f"{next(iter(missing.values()))}: must be a model, found none of any group")
    return found


def check_writable(paths: Mapping[str, Path]) -> None:
    """Find out before hours of scoring whether files can be written, and make their folders.

    paths: of the files, by the option that names them
    Raises OSError naming the option.
    """
    for option, path in paths.items():
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix="."):
                pass
        except OSError as error:
            message = f"{option}: must be a path that can be written, found {error.strerror}"
            raise OSError(error.errno, message, str(path)) from error


def run(program: str, main: Callable[[], None]) -> None:
    """Run a command; what the user can mend is said in one line, anything else keeps its traceback."""
    try:
        main()
    except MENDABLE as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; no file was left half written", file=sys.stderr)
        sys.exit(INTERRUPTED)
