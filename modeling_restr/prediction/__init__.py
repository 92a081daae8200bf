"""Masks for data of any size, on one machine or a Ray cluster (`pip install "modeling-restr[scale]"`)."""
