"""`python -m quantflow` is the quantflow command."""

from quantflow.cli import main

main()
