"""``python -m lightning_tta``, also installed as ``lightning-tta``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; imports only what it needs."""
    from lightning_tta.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
