"""What is measured of a net: test metrics, conflict of class gradients, similarity of branches.

It takes a net, the config and the data of its run, in this order, and changes none of them. It does
not know the training loop.
"""
