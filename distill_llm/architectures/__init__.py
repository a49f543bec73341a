"""Transformer families as rows, the code that pruned checkpoints carry, and modes that a model is put in for a while.

Needs torch and transformers only.

May import: nothing of the package.
"""
