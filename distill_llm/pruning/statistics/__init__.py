"""One pass over calibration data, and all that it finds about every unit.

May import of pruning: units.
"""
