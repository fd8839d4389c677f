"""The report of a study: its sections, tables and figures, as Markdown, HTML and README.

It shows findings (csba_jax.analysis) and computes nothing of its own.
"""
