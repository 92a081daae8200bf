"""Evaluation on prepared data; never imported by the model files. Needs the extra `train`."""
