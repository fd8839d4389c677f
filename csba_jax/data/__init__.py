"""Images and labels: sources, caches, splits, samplers, augmentation, mixing and class counts.

It turns a config into arrays and batches. It does not know models, losses or gradients.
"""
