"""What an option may be: types that say what they want, and a parser whose errors are one sentence.

A type's `word` is what --help calls its value (NAME where it has none); its `names` are listed there.
"""

import difflib
import os
import time
from argparse import ArgumentParser, ArgumentTypeError, HelpFormatter, Namespace
from functools import partial

from utils.errors import printable


def nearest(word, names):
    """', did you mean "x"?' or nothing: the end of a message about an unknown word."""
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def one_of(*names):
    """A name out of a list, in any case: `Adamw` is AdamW."""

    def parse(text):
        for name in names:
            if str(text).lower() == name.lower():
                return name
        message = f"{text!r} is not one of {', '.join(names)}{nearest(text, names)}"
        raise ArgumentTypeError(message.replace("'", '"'))

    parse.names = names
    return parse


def number(kind, wanted, valid):
    """An int or a float of which valid(value) is true; `wanted` says in words which those are."""

    def parse(text):
        try:
            value = kind(text)
            exact = kind is float or isinstance(text, str) or value == text  # a YAML file's 2.5 is not 2
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is None or isinstance(text, bool) or not exact or not valid(value):
            raise ArgumentTypeError(f'"{text}" is not {wanted}')
        return value

    parse.word = "N" if kind is int else "X"
    return parse


def number_list(text):
    """`0,17` or `0-5,17` as [0, 17], [0, 1, …, 5, 17]."""
    found = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ArgumentTypeError(f'"{text}" is not a list of numbers such as 0,17 or 0-5,17')
        found += range(int(first), int(last or first) + 1)
    return found


number_list.word = "N,N,…"


def path(text):
    """A path, `~` in it the home folder: a shell replaces it only where it begins a word of its own."""
    return os.path.expanduser(str(text))


class Parser(ArgumentParser):
    """argparse, but an error is one sentence without sixty lines of usage before it."""

    def __init__(self, **kwargs):
        a_line_each = partial(HelpFormatter, max_help_position=40)
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=a_line_each, **kwargs)

    def error(self, message):
        self.exit(2, f"error: {printable(message)} ({self.prog} --help lists every option)\n")

    def exit(self, status=0, message=None):
        """Under torchrun all processes read the same words: one on each machine says what is wrong."""
        if status and "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)  # torchrun ends the others as soon as one has ended
            message = None
        super().exit(status, message)

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            what = "unknown option" if word.startswith("-") else "unexpected word"
            self.error(f"{what} {word}{nearest(word, self._option_string_actions)}")
        return args

    def typed(self, argv=None):
        """{name: value} of what stands on the command line itself, whatever its value."""
        nothing = object()
        absent = Namespace(**dict.fromkeys((action.dest for action in self._actions), nothing))
        found = vars(self.parse_args(argv, absent))
        return {name: value for name, value in found.items() if value is not nothing}

    def options(self):
        return {a.dest: a for a in self._actions if a.dest not in ("help", "config_file")}
