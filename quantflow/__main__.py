"""`python -m quantflow` is the quantflow command."""

from quantflow.cli.command import main

main()
