"""The recurrent-depth transformer, and the law of its depths."""
