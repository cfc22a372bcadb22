"""Objectives and their training programs, one family's recipes in each file."""
