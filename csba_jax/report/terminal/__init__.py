"""Tables for a terminal: results of runs, a diagnosis, seeds, learning rates.

They read results. They know nothing of pages and figures.
"""
