"""A trained net as files that need neither this package nor the training data.

It knows how a run predicts, and nothing of how it is trained or reported.
"""
