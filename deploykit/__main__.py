"""``python -m deploykit``."""

from deploykit.cli import main

main()
