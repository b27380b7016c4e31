"""Which method suits a stream, found out on its first batches without labels, or with a few."""
