"""The training of one run: its job, the compiled step, its input, the loop, what follows a step.

It does not know studies: a run does not know that others exist.
"""
