"""What is measured of a net: test metrics, conflict of class gradients, similarity of branches.

It takes (net, config, data) and changes none of them. It does not know the training loop.
"""
