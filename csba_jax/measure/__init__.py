"""What is measured of a net: test metrics, conflict of class gradients, similarity of branches.

It reads runs and never changes them. It does not know the training loop.
"""
