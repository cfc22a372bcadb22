"""The training loop: optimisers, schedule, saved states, logs, processes. It knows no objective."""
