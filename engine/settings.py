"""Settings: the fields of a dataclass as command-line flags, and mistakes as one line on stderr with exit code 2."""

import argparse
import math
import os
import signal
import sys
import time
from dataclasses import field, fields
from pathlib import Path

from engine.terminal import printable, replace_unprintable

main_file = Path(getattr(sys.modules["__main__"], "__file__", None) or sys.argv[0]).resolve()
is_ours = main_file.is_relative_to(Path(__file__).resolve().parents[1]) and "site-packages" not in main_file.parts
# With python -m, the file is not known yet while its package is imported, and the first argument is "-m".
is_script = is_ours and main_file.suffix == ".py" or sys.argv[0] == "-m"
if is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until run_script(), Ctrl-C ends a script of this project at once. Imports take seconds, in which an exception may
    # be lost, or turned into another.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong and what to do."""


def flag(default, help, choices=None, minimum=-math.inf, maximum=2**63 - 1, fixed=False, word=None):
    """Declare a field of a settings dataclass, with its help text and either its choices or its range.

    A `fixed` setting cannot be changed when a run is resumed. A switch may have a `word`, as in --resume auto. To check
    settings against each other, raise UserError in the dataclass's __post_init__.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={"help": help, "fixed": fixed, "word": word, **limits})


# The flags of all scripts that name a file or a folder
PATHS = {"init_from", "out_dir", "source", "val", "dataset", "corpus", "out", "logs", "pictures", "tokenizer"}


class Parser(argparse.ArgumentParser):
    """argparse with a module's docstring for --help, no abbreviated flags, and errors in one line."""

    def __init__(self, description, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message):
        fail(f"{message}; --help lists the flags")

    def parse_known_args(self, args=None, namespace=None):
        """Parse, and expand ~ in paths, which the shell leaves as it is in --out_dir=~/runs."""
        parsed, unknown = super().parse_known_args(args, namespace)
        for name in PATHS & vars(parsed).keys():
            value = getattr(parsed, name)
            setattr(parsed, name, type(value)(os.path.expanduser(value)))
        return parsed, unknown


def parse_flags(settings_class, description, tiny=None, argv=None):
    """Parse the flags of a settings dataclass -> {name: value} of those that were given.

    `tiny`, the defaults that the preset tiny changes, appears in the help only. Exits with code 2 on a wrong flag.
    """
    parser, tiny = Parser(description, argument_default=argparse.SUPPRESS), tiny or {}
    for f in fields(settings_class):
        options = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata["choices"]:
            options["choices"] = f.metadata["choices"]
        if f.metadata["word"]:
            parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
            options = {"nargs": "?", "const": True, "choices": (f.metadata["word"],)}
        default = f"{f.default!r}; tiny: {tiny[f.name]!r}" if f.name in tiny else repr(f.default)
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default: {default})", **options)
    given = vars(parser.parse_args(argv))
    for f in fields(settings_class):
        if f.name in given and given[f.name] != f.metadata["word"] and not is_allowed(f, given[f.name]):
            minimum, maximum = f.metadata["minimum"], f.metadata["maximum"]
            limit = f"the least is {minimum}"
            if maximum < 2**63 - 1 or given[f.name] > maximum:
                limit += f", the most {maximum}"
            parser.error(f"--{f.name} {given[f.name]} is out of range; {limit}")
    return given


def is_allowed(f, value):
    """Return True if a value has the type of a settings field and is among its choices or in its range."""
    choices = f.metadata["choices"]
    if type(value) is not f.type or (choices and value not in choices):
        return False
    return f.type not in (int, float) or f.metadata["minimum"] <= value <= f.metadata["maximum"]  # False for NaN


# Messages of torch and numpy that mean a full memory, where they do not raise MemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "size calculation overflowed", "array is too big")


def explain(error):
    """Return the message for an error that the user or the machine caused, or "" for a bug."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        is_dangling = os.path.islink(error.filename) and not os.path.exists(error.filename)
        reason = f"a link to {os.readlink(error.filename)}, which does not exist" if is_dangling else error.strerror
        return f"{error.filename}: {reason}"
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

    Under torchrun, the other processes wait 5 s, so that process 0's message comes first; torchrun then ends them.
    """
    if os.environ.get("RANK", "").strip("0").isdecimal():  # other programs may have set it to anything
        time.sleep(5)
    print("error:", printable(" ".join(str(message).splitlines())), file=sys.stderr)
    sys.exit(2)


def run_script(main):
    """Call main(), without tracebacks for what the user or the machine got wrong: one line on stderr, exit code 2.

    Ctrl-C exits with code 130, a closed pipe, as in `| head`, with 141, as for other programs.
    """
    replace_unprintable()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # else Python fails once more as it writes the rest
        os.dup2(nowhere, 2)
        sys.exit(141)
    except Exception as error:
        if not (message := explain(error)):
            raise
        fail(message)
