"""What each technique of a recipe contributes."""
