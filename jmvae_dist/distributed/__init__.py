"""Processes and how they agree: launch environment, Accelerate runtime, small collectives."""
