"""Training: plain eager PyTorch."""
