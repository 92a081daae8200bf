"""Data for training and evaluation; never imported by the model files."""
