"""The command line: ``python -m tokenscope``. Each command's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

SERVERS = ("wsgiref", "waitress", "gunicorn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 if all is well, 1 if a promise did not hold, 2 for a wrong command.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    return _run_demo(options, parser)


def _run_demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from tokenscope.cli import demo  # noqa: PLC0415  # `--help` needs none of it

    missing = demo.what_is_missing(options.server)
    if missing is not None:
        parser.exit(2, f"tokenscope demo: {missing}\n")
    return demo.serve(options) if options.serve else demo.run(options)


def make_parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenscope",
        description="Structured concurrency and cancellation for synchronous, threaded Python.",
    )
    commands = parser.add_subparsers(dest="command", title="commands")
    _describe_demo(
        commands.add_parser(
            "demo",
            help="see what hang-ups cost, without tokenscope and with it",
            description="Clients of a chat app hang up while it reads from a (pretended) language model."
            " The same clients come twice: to the app as it is usually written, and to the app with"
            " tokenscope. The receipt tells what was billed for nobody.",
        )
    )
    return parser


def _describe_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--clients", type=_at_least(1), default=30, metavar="N", help="how many (default: 30)")
    demo.add_argument("--seed", type=int, default=1, metavar="N", help="of all chance in it (default: 1)")
    demo.add_argument("--server", choices=SERVERS, default="wsgiref", help="of the app (default: wsgiref)")
    demo.add_argument(
        "--rate", type=_at_least(1), default=50, metavar="N", help="tokens a second and call (default: 50)"
    )
    demo.add_argument("--price", type=_price, default=10.0, metavar="USD", help="of a million tokens (default: 10)")
    demo.add_argument("--json", action="store_true", help="print the receipt as JSON")
    demo.add_argument("--serve", action="store_true", help="only serve the app, for curl and your own clients")
    demo.add_argument(
        "--port", type=_at_least(0, most=65535), default=8000, metavar="N", help="for --serve (default: 8000; 0: any)"
    )


def _price(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:  # nor is it NaN
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


_price.__name__ = "number"  # argparse names it when the text is no number at all


def _at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A reader of whole numbers from ``least`` to ``most``."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {number}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be {most} or less, not {number}")
        return number

    read.__name__ = "whole number"  # argparse names it when the text is no number at all
    return read
