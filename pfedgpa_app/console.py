"""Common parts of the commands of ``pfedgpa``."""

import codecs
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from pfedgpa_app.config import Config
from pfedgpa_app.errors import described
from pfedgpa_app.files import printable_lines
from pfedgpa_app.report import Run
from pfedgpa_app.rounds import RowError
from pfedgpa_app.runs import find_run

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OutputDir = Annotated[
    str, typer.Option(help="Folder of the runs, relative to the home folder; '' is the default.")
]
RunArgument = Annotated[
    str,
    typer.Argument(
        help="A run's name or id, the beginning of either, `latest`, or its folder.",
        metavar="RUN",
    ),
]

DEBUG = "PFEDGPA_DEBUG"
"""Environment variable: raise errors with their traceback."""

_WIDER_THAN_ANY = 10_000
_REPLACED = "pfedgpa-replaced"
_PLAIN = {"±": b"+-", "–": b"-", "—": b"-", "…": b"...", "×": b"x"}  # noqa: RUF001

_PERMITTED = "one that you may read, and write where something is written"
# What would be right, by the system's error code.
_RIGHT = {
    errno.ENOENT: "one that exists",
    errno.ENOSPC: "free space on its disk",
    errno.EDQUOT: "free space in your quota",
    errno.EACCES: _PERMITTED,
    errno.EPERM: _PERMITTED,
    errno.ENOTDIR: "a folder",
    errno.EISDIR: "a file",
    errno.EROFS: "one on a disk that may be written",
}


def _replaced(error: UnicodeError) -> tuple[bytes, int]:
    """Encode characters that a terminal's encoding lacks, such as ± in ASCII.

    Surrogates in a file's name are printed as the bytes for which they stand.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = (
        bytes([ord(each) - 0xDC00]) if "\udc80" <= each <= "\udcff" else _PLAIN.get(each, b"?")
        for each in error.object[error.start : error.end]
    )
    return b"".join(written), error.end


codecs.register_error(_REPLACED, _replaced)


class OneLineErrors(TyperGroup):
    """Commands that report errors in one line; `DEBUG` shows tracebacks."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=_REPLACED)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command."""
        if os.environ.get(DEBUG):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        # Regular ends of a command, and a closed pipe.
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except RowError as error:
            fail(str(error))
        except OSError as error:
            fail(explain(error))
        except Exception as error:
            fail(f"{described(error)}; {DEBUG}=1 shows its traceback")


def make_app(**options: Any) -> typer.Typer:
    """Return an app with `OneLineErrors`.

    Typer's own tracebacks are off, since they print all variables, weights included.
    """
    return typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False, **options)


def explain(error: OSError) -> str:
    """Return a one-line message for a system error, with what would be right."""
    if error.strerror is None:  # raised by this app
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    right = f"; right would be {_RIGHT[error.errno]}" if error.errno in _RIGHT else ""
    return f"{where}{error.strerror}{right}"


def read_run(run: str, output_dir: str) -> Run:
    """Read a run in the output folder, or at a path, or end the command."""
    try:
        return Run.read(find_run(run, Config(output_dir=output_dir).output_path, Path.cwd()))
    except ValueError as error:
        fail(str(error))


def whole_numbers(option: str, text: str, example: str) -> list[int]:
    """Return the numbers of a comma-separated option, or end the command."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,15}", number) for number in numbers):
        fail(
            f'{option} "{text}": right would be whole numbers from 0, of up to 15 digits, such as '
            f'"{example}"'
        )
    return [int(number) for number in numbers]


def make_table(*columns: str) -> Table:
    """Return a table without lines around its cells."""
    return Table(*columns, box=None, pad_edge=False)


def print_table(table: Table) -> None:
    """Print a table untruncated; a terminal wraps long lines."""
    Console(width=_WIDER_THAN_ANY, markup=False, emoji=False).print(table)


@contextmanager
def terminable() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, which ends all processes and runs."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str) -> NoReturn:
    """End the command with a message."""
    print(printable_lines(message), file=sys.stderr)
    raise typer.Exit(1)
