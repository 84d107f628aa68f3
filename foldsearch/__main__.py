"""`python -m foldsearch` is the `foldsearch` command."""

from foldsearch.cli import entry

entry()
