"""How near a backend must come to the reference: the one table."""

import torch

# Relative error of one rounding to nearest.
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# float32 arithmetic in another order, on values of order one.
FLOAT32_SLACK = 2e-6
# Triton's interpreter cuts bfloat16 off instead of rounding it: twice the error. Hardware rounds.
INTERPRETER_ROUNDING = {**ROUNDING, torch.bfloat16: 2.0**-7}


def assert_rounded_once(actual, exact, dtype, interpreted=False):
    """``actual`` is ``exact`` (of float32 or more) rounded once to ``dtype``, up to the slack."""
    assert actual.dtype == dtype and actual.shape == exact.shape
    rounding = (INTERPRETER_ROUNDING if interpreted else ROUNDING)[dtype]
    error = (actual.double() - exact.double()).abs().flatten()
    excess = error - FLOAT32_SLACK - rounding * exact.double().abs().flatten()
    if error.numel() and excess.max() > 0:
        i = int(excess.argmax())
        raise AssertionError(f"flat index {i}: {actual.flatten()[i].item()} against {exact.flatten()[i].item()}")


def assert_no_worse(actual, eager, exact, dtype, interpreted=False):
    """``actual`` errs at most twice as much as plain torch does in ``dtype``, and as rounding ``exact`` once may."""
    assert actual.dtype == dtype and actual.shape == exact.shape
    if exact.numel() == 0:
        return
    rounding = (INTERPRETER_ROUNDING if interpreted else ROUNDING)[dtype]
    error, allowed = ((t.double() - exact).abs() for t in (actual, eager))
    limit = 2 * allowed.max() + FLOAT32_SLACK + rounding * exact.abs()
    excess = (error - limit).flatten()
    if not excess.max() <= 0:  # NaN too
        i = int(excess.nan_to_num(torch.inf).argmax())
        raise AssertionError(f"flat index {i}: {actual.flatten()[i].item()} against {exact.flatten()[i].item()}")
