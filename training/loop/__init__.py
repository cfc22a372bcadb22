"""The training loop: optimiser, schedule, saved states, processes."""
