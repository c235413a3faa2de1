"""The published format: folders that Hugging Face transformers reads."""
