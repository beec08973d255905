"""Tokenizers, data formats, and one folder per data set with its prepare.py."""

import argparse
import os
import sys
import time


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


def one_line(message):
    """A message without the line breaks of what it quotes."""
    return " ".join(str(message).splitlines())


def fail(message):
    """Leave with one line on stderr and exit code 2. Of several processes that torchrun started, the first goes before:
    then torchrun ends the others, which most likely failed alike."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(5)
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse with a module's docstring for --help, no abbreviated flags, and errors in one line."""

    def __init__(self, description, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        fail(f"{message}; --help lists the flags")


# What torch and numpy say of more than the memory holds, where they do not raise a MemoryError.
TOO_LARGE = ("can't allocate memory", "out of memory", "size calculation overflowed", "array is too big")


def explain(error):
    """What to tell the user about an exception; nothing about one that is a mistake of the program."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in TOO_LARGE):
        return "the memory is full; try a smaller batch or model"
    if "No working C++ compiler" in str(error):
        return "torch.compile finds no C++ compiler; do without --compile, or with --compile off"
    if "Failed to find C compiler" in str(error):
        return "Triton finds no C compiler; install gcc, or set CC to another"
    return ""


def run_script(main):
    """Call main() without tracebacks: what the user or the machine got wrong is one line on stderr and exit code 2,
    Ctrl-C is exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not (message := explain(error)):
            raise
        fail(message)
