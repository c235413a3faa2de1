"""The published format: weights in and out."""
