"""Units of a model (heads, neurons, channels): how many there are, what each costs, where the residual stream reads them.

May import of pruning: nothing.
"""
