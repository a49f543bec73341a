"""From scores and a budget to a plan.

May import of pruning: names, units, plan, statistics, criteria, importance, compensation, cutting.
"""
