"""`python -m demur.cli`."""

from demur.cli.main import main

main()
