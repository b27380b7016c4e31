"""One predict run: what it knows, what it writes, how it resumes."""
