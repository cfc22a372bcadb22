"""How many threads a program of ours uses, and how they wait for each other."""

from __future__ import annotations

import os

WAIT_POLICY = "OMP_WAIT_POLICY"


def wait_passively_if_busy() -> None:
    """Where the machine is overloaded, let PyTorch's threads sleep where they wait for each other.

    By default they spin, which takes the core from the very thread that they wait for, if others want it, too. Must be
    called before PyTorch is imported, which reads the variable. A policy that is set stays.
    """
    if WAIT_POLICY in os.environ or not hasattr(os, "getloadavg"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if os.getloadavg()[0] > cores:
        os.environ[WAIT_POLICY] = "passive"


def limit_threads() -> None:
    """No more threads of PyTorch than the process may use cores, unless OMP_NUM_THREADS says how many.

    PyTorch counts the cores of the machine, also in a container that may use two of them.
    """
    import torch

    from msdd_fast.backends.environment import usable_cores

    cores = usable_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
