"""Raw text to packed, shuffled, verified rows of tokens."""
