"""The training of one run: the compiled step, its input, the loop, and what follows a step.

It does not know studies: a run does not know that others exist.
"""
