"""A base graph and a delta in, a model that one runtime opens out."""
