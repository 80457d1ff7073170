"""Learning omega(c, s, t)."""
