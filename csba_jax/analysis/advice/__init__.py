"""What the numbers of one run say about its problems, and which recipe to try next.

Rules read evidence and say yes, no or not known. It does not read files of a run.
"""
