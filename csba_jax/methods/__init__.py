"""What a run optimises and reports: losses, class weights, optimisers, metrics, second stages.

Each is a function of arrays or a row of a table. They do not know the training loop or files.
"""
