"""Claims of papers, rerun: their constants and figures as data, and what compares ours with theirs."""
