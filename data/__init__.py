"""Tokenizers, data formats, and one folder per data set with its prepare.py."""

import sys


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


def run_script(main):
    """Call main(); a UserError becomes its one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
