"""Recognition of collapse without labels: a wrapper for any loop, and a callback for runs."""
