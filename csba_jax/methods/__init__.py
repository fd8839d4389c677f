"""What a run optimises and reports: losses, weights, optimisers, metrics, second stages, surgery.

Each is a function of arrays or a row of a table. They do not know the training loop or files.
"""
