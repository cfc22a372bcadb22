"""The few exception types a user of msdd-fast can meet.

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations


class MsddFastError(Exception):
    """Base class of every error that this library raises on purpose."""


class InputError(MsddFastError, ValueError):
    """An argument has the wrong type, shape, dtype, device or value."""


class ConfigError(MsddFastError, ValueError):
    """A configuration is impossible or contradicts itself."""


class CheckpointError(MsddFastError, RuntimeError):
    """A checkpoint is missing, damaged, foreign, or does not match its configuration."""


class AccuracyError(MsddFastError, RuntimeError):
    """A faster way of decoding changes the images by more than it may."""


class TrainingError(MsddFastError, RuntimeError):
    """A training run cannot go on: its loss has been NaN or far too high for too long."""


class BackendUnavailableError(MsddFastError, RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class RegressionError(MsddFastError, RuntimeError):
    """A benchmark found something slower than the base it was compared with."""
