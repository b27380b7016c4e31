"""The measurements behind the README's figures: ``python -m lightning_tta.benchmarks.NAME``."""
