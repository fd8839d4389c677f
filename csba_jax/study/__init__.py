"""Many runs: the grid, the default comparisons, the workers, and the results on disk.

It does the runs and stores what they say. It draws no conclusion from them.
"""
