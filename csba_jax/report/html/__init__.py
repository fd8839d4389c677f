"""Blocks of a report, and a page of HTML and SVG made of them; they know no study."""
