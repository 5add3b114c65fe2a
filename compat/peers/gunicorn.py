"""gunicorn: one worker process, of the class that the first argument names."""

from __future__ import annotations

import os
import sys

# Its pool starts threads when it likes, up to --threads.
THREADS = r"MainThread|ThreadPoolExecutor-.*"


def command(worker: str, fd: int) -> list[str]:
    """Return the command line, as somebody would type it."""
    from gunicorn import config  # type: ignore[import-untyped]

    threads = ["--threads", "8"] if worker == "gthread" else []
    # Since 25.1 it puts a socket into the home directory, the same one for all that run.
    quiet = ["--no-control-socket"] if hasattr(config, "ControlSocketDisable") else []
    return [
        *(sys.executable, "-m", "gunicorn", "compat.app:build()"),
        *("--bind", f"fd://{fd}", "--workers", "1", "--worker-class", worker, *threads),
        *("--keep-alive", "5", "--graceful-timeout", "5", *quiet),
    ]


def main(worker: str, fd: str) -> None:
    """Become gunicorn."""
    argv = command(worker, int(fd))
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(*sys.argv[1:])
