"""Learning from classes of unequal size in JAX: gradient conflict and attention against it."""

__version__ = '0.1.0'
