"""Measurements against what users would pick instead; run by hand, not by the suite."""
