"""One pass over calibration data, and what it finds out about every unit.

May import of pruning: units.
"""
