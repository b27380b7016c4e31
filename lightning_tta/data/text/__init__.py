"""Prompts with answers, for language models: files, embedded tasks, shifts of format, checkers."""
