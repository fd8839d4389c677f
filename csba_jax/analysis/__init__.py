"""From results of a study to findings: statistics, comparisons, conflict against gain, verdicts.

It computes every number and every sentence once. It does not know pages, tables or figures.
"""
