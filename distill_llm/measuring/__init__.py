"""What a model costs: parameters, FLOPs, memory and latency.

May import: common, architectures, models.
"""
