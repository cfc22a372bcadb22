"""msdd-fast inside other software; each integration needs an extra of its own."""
