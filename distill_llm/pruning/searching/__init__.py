"""Plans found by evolution: how many units each layer keeps, by what the model does without the others.

May import of pruning: units, plan, importance, statistics, cutting, planning.
"""
