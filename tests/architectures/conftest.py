"""Tests of pruning compare with references in fp32, whatever this processor is fastest at."""

from builders.pruning import fp32, fp32_for_module_fixtures

__all__ = ["fp32", "fp32_for_module_fixtures"]
