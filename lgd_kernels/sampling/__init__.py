"""Define schedules and solvers, and sample with them."""
