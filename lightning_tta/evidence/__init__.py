"""What a stream says without labels, or with few: bets on a shift, estimates of accuracy, scores. Knows no method."""
