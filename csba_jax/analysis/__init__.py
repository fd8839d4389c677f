"""From results of a study or a run to findings: statistics, comparisons, verdicts, advice.

It computes every number and every sentence once. It does not know pages, tables or figures.
"""
