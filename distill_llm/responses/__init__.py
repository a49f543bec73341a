"""Responses that a teacher generates off-line, to train students on: sequence-level distillation (Kim and Rush, 2016).

May import: common, architectures, losses, data, models.
"""
