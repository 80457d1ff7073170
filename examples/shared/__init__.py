"""What the studies share: denoiser, sampling, omegas to compare, figures of merit, pictures and reports."""
