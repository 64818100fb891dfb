"""What one experiment is: schema, overrides, every problem at once."""
