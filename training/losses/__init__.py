"""Losses: adversarial, perceptual, and the networks behind them."""
