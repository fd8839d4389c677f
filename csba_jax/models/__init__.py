"""The networks as Flax modules: branches, attention, classifiers, and their parameter counts.

They know shapes only. They do not know data sets, losses, training or files.
"""
