"""The terminal: what may be printed there, and messages that are typed or pasted into it."""

import contextlib
import re
import select
import sys
import time

try:
    import termios
except ImportError:  # Windows
    termios = None


def printable(text):
    r"""Replace control characters by their escapes, like \x1b, which a terminal shows. Newlines and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], text)


def replace_unprintable():
    """Let streams replace the characters that their encoding lacks, instead of raising an error."""
    for stream in (sys.stdin, sys.stdout):  # stderr does so by itself
        with contextlib.suppress(AttributeError, ValueError):  # it is closed, a notebook's, or was read from
            stream.reconfigure(errors="replace")


def read_message(prompt="> "):
    """Read a line, with history and arrow keys, or a pasted text of several. Returns None if the input has ended."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (changes input(); here, since other scripts do not read what is typed)
    try:
        lines = [input(prompt)]
        # A terminal that marks what is pasted (bracketed paste) makes it one line. Of others, the rest waits already.
        while termios and is_terminal() and select.select([sys.stdin], [], [], 0.05)[0]:
            lines.append(input())
    except (EOFError, RuntimeError):  # RuntimeError: there is no stdin
        print()
        return None
    return "\n".join(lines).rstrip()


def discard_input():
    """Discard what was typed or pasted and not read, which the user's shell would run as commands."""
    if termios and is_terminal():
        time.sleep(0.05)  # more may be on its way
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def is_terminal():
    return sys.stdin is not None and sys.stdin.isatty()
