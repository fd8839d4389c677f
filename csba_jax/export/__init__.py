"""A trained net as files that need neither this package nor the data.

It knows how a run predicts. It does not know how a run is trained or reported.
"""
