"""Long-tailed image learning in JAX: Class-Specific Branch Attention, its controls, its proof."""

__version__ = '0.1.0'
