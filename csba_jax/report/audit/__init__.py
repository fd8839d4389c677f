"""The report of an audit: lines for a terminal, and a page with thumbnails.

It shows what csba_jax.data.audit has found and reads the folder for thumbnails alone.
"""
