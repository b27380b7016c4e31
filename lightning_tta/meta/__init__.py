"""What meta-training and its test time share."""
