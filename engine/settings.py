"""Settings: the fields of a dataclass as command-line flags, and mistakes as one line on stderr with exit code 2."""

import argparse
import math
import os
import sys
import time
from dataclasses import field, fields


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong and what to do."""


def flag(default, help, choices=None, minimum=-math.inf, maximum=2**63 - 1, fixed=False):
    """A field of a settings dataclass, with its help text and either its choices or its range.

    A `fixed` setting cannot be changed when a run is resumed.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "fixed": fixed}
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse with a module's docstring for --help, no abbreviated flags, and errors in one line."""

    def __init__(self, description, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        fail(f"{message}; --help lists the flags")


def parse_flags(settings_class, description, tiny=None, argv=None):
    """Parse the flags of a settings dataclass -> {name: value} of those that were given.

    `tiny`, the defaults that the preset tiny changes, appears in the help only. Exits with code 2 on a wrong flag.
    """
    parser, tiny = Parser(description, argument_default=argparse.SUPPRESS), tiny or {}
    for f in fields(settings_class):
        options = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata["choices"]:
            options["choices"] = f.metadata["choices"]
        default = f"{f.default!r}; tiny: {tiny[f.name]!r}" if f.name in tiny else repr(f.default)
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default: {default})", **options)
    given = vars(parser.parse_args(argv))
    for f in fields(settings_class):
        if f.name in given and not is_allowed(f, given[f.name]):
            minimum, maximum = f.metadata["minimum"], f.metadata["maximum"]
            limit = f"the least is {minimum}"
            if maximum < 2**63 - 1 or given[f.name] > maximum:
                limit += f", the most {maximum}"
            parser.error(f"--{f.name} {given[f.name]} is out of range; {limit}")
    return given


def is_allowed(f, value):
    """True if a value has the type of a settings field and is among its choices or in its range."""
    choices = f.metadata["choices"]
    if type(value) is not f.type or (choices and value not in choices):
        return False
    return f.type not in (int, float) or f.metadata["minimum"] <= value <= f.metadata["maximum"]  # False for NaN


# Messages of torch and numpy that mean a full memory, where they do not raise MemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "size calculation overflowed", "array is too big")


def explain(error):
    """The message for an exception that the user or the machine caused, or "" for a fault of the program."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (UserError, OSError)):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "the memory is full; try a smaller batch or model"
    if "No working C++ compiler" in str(error):
        return "torch.compile finds no C++ compiler; do without --compile, or with --compile off"
    if "Failed to find C compiler" in str(error):
        return "Triton finds no C compiler; install gcc, or set CC to another"
    return ""


def fail(message):
    """Print one line on stderr and exit with code 2.

    Under torchrun, process 0 goes first: torchrun then ends the others, which most likely failed alike.
    """
    if int(os.environ.get("RANK", 0)):
        time.sleep(5)
    print("error:", " ".join(str(message).splitlines()), file=sys.stderr)
    sys.exit(2)


def run_script(main):
    """Call main() without tracebacks for what the user or the machine got wrong: one line on stderr, exit code 2.

    Ctrl-C is exit code 130.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not (message := explain(error)):
            raise
        fail(message)
