"""Tokenizers, data formats, and one folder per data set with its prepare.py."""

import sys


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


def run_script(main):
    """Call main() without tracebacks: a UserError is its one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
