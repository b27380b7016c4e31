"""Serving: the source answers requests, a method adapts unseen beside it, and answers once the evidence favors it."""
