"""What people read: text on a terminal, and the report of a study as Markdown and HTML.

It computes nothing of its own: it shows results and findings.
"""
