"""Drives the engine on a GPU and writes the profiles that the planner reads; trains the models to measure with."""
