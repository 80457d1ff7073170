"""The energy loss of guided particles against noised data, its gradient, and its curve over omega, in one pass."""
