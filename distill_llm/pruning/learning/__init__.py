"""Masks over heads and neurons that are learnt while the model trains, and end in a plan.

May import of pruning: units, plan, importance, cutting, planning.
"""
