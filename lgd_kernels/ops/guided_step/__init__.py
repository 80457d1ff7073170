"""Guide, and step from t to s: x_s from x, cond and uncond in one pass, with noise drawn on the way."""
