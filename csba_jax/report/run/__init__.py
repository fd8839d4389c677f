"""The report of one run: a page for its owner, and a card for a net that is handed over.

It computes nothing of its own; it does not know studies.
"""
