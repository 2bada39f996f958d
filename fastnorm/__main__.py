"""`python -m fastnorm bench` and `python -m fastnorm info`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fastnorm


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    program = "fastnorm" if Path(sys.argv[0]).stem == "fastnorm" else "python -m fastnorm"
    parser = argparse.ArgumentParser(prog=program, description=fastnorm.__doc__)
    parser.add_argument("--version", action="version", version=fastnorm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="print versions, the extension, threads and backends")
    bench = commands.add_parser("bench", help="check and time everything; a table, JSON and a plot")
    asked = next((word for word in (sys.argv[1:] if arguments is None else arguments) if word[:1] != "-"), None)
    if asked != "bench":
        parser.parse_args(arguments)
        fastnorm.show_config()
        return 0
    from fastnorm.bench import cli

    cli.add_arguments(bench)
    return cli.main(bench, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
