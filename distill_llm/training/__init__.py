"""DistillationTrainer and what it is made of.

May import: common, architectures, losses, data, models, pruning, teachers, responses, synthesis.
"""
