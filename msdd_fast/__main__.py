"""``msdd-fast`` and ``python -m msdd_fast``: Ctrl-C and SIGTERM are handled before anything slow is imported."""

import sys

from msdd_fast.io.program import run_program


def main() -> int:
    """Run the command line; returns the exit code."""
    return run_program(_run)


def _run() -> int:
    from msdd_fast.commands.main import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
