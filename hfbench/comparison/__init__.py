"""A candidate against its baseline: intervals, accuracy, verdict, sentence."""
