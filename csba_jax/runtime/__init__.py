"""The machine that a run uses: devices, processes, signals, progress on a terminal.

It knows JAX and the operating system. It does not know models, data or studies.
"""
