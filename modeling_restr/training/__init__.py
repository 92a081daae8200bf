"""Training: recipe, batches, augmentation and checkpoints; never imported by the model files."""
