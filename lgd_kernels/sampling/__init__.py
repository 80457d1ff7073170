"""Schedules, solvers and the sampler."""
