"""One run on disk: its folder, checkpoints and records, its state and schedule, and its net.

It knows how a run is stored and read again. It does not know how a run is trained or measured.
"""
