"""The energy loss of guided particles against noised data, its gradient and its whole curve over omega, in one pass."""
