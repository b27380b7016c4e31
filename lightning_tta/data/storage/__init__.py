"""Caches, downloads and remote files."""
