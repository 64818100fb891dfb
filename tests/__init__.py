"""Tests of hfbench."""
