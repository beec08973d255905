"""Tokenizers, data formats, and one folder per data set with its prepare.py."""

import argparse
import sys


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse with a module's docstring for --help, no abbreviated flags, and errors in one line."""

    def __init__(self, description, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists the flags\n")


def run_script(main):
    """Call main() without tracebacks: what the user or the machine got wrong is one line on stderr and exit code 2,
    Ctrl-C is exit code 130."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
