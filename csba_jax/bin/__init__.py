"""The command-line programs: flags, and one call each.

Nothing else lives here, so that notebooks and tests call the same functions.
"""
