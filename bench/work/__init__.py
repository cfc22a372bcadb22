"""FLOP and bytes by formula, and ahead-of-time compilation."""
