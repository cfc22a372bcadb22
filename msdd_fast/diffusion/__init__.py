"""Noise, schedule, positions and patches: the mathematics that every family shares."""
