"""Images in, batches out: sources, decoding, augmentation, exact pixels."""
