"""Tests that drive the real commands and the real clients."""
