"""The fastest settings of a recipe on this machine."""
