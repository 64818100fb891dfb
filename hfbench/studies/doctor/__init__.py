"""What limits a recipe on this machine, and what could help."""
