"""Where time, memory, energy and arithmetic go."""
