"""What a run leaves behind: schema with units, folders, checkpoints, predictions."""
