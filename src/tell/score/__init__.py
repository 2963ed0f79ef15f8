"""Scorers, intervals, the verdict and the general probe. Imports no torch."""
