"""A name becomes a classifier and its image processor."""
