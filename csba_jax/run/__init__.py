"""One run on disk: its folder, checkpoints and records, its state, its schedule, its restoring.

It knows how a run is stored. It does not know how a run is trained or measured.
"""
