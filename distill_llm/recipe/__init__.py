"""The recipe: its sections, YAML and overrides. Needs no torch.

May import: common, losses, pruning, quantizing.
"""
