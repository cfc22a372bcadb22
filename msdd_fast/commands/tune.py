"""Measure what is fastest on this machine, for the table of MSDD_FAST_TUNED: attention backends, products on a CPU.

All that can run are timed in turn, round after round, and the medians are compared.
"""

from __future__ import annotations

import argparse

from msdd_fast.io.arguments import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--heads", type=positive_int, default=12, help="heads of an image (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=positive_int, default=25, help="timings of each backend (default: %(default)s)"
    )
    parser.add_argument(
        "-o", "--out", "--json", dest="out", metavar="FILE", help="write the table here (default: print it)"
    )


def run(args: argparse.Namespace) -> None:
    from msdd_fast.commands.tuning import tune

    tune(args)
