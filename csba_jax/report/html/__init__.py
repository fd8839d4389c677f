"""A report as blocks, and a page of HTML and SVG made of them.

It does not know what is reported: a study, an audit.
"""
