"""Pretraining of recurrent-depth language models: raw text to a trained model."""

__version__ = "0.1.0"
