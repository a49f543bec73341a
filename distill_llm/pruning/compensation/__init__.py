"""What stays takes over what is removed: linears, channels of the residual stream, whole layers.

May import of pruning: units, plan, statistics.
"""
