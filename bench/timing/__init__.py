"""Clocks, timers, ceilings and profiles."""
