"""clip(x0, -s, s) / s, s a quantile of each sample's |x0|: Imagen's dynamic thresholding."""
