"""What the numbers of one run say about its problems, and which recipe to try next.

Rules read evidence and say yes, no or not known. They do not know tables or pages.
"""
