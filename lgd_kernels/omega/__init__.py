"""Where omega(c, s, t) comes from."""
