"""Synthetic corruptions and the function sets that name them."""
