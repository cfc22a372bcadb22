"""Load test of ``msdd-fast serve``."""
