"""Numbers over heads and neurons that are learnt: masks, which end in a plan, and scales, which are folded into the weights.

May import of pruning: units, plan, importance, statistics, cutting, planning.
"""
