"""From statistics of a model to a plan, and from a plan to a smaller model.

May import: common, architectures, losses, measuring, models.
"""
