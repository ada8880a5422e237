"""What an option may be: argparse types that say what they want; a parser whose errors are one sentence."""

import argparse
import difflib
import math
import os
import time

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
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(names)}{nearest(text, names)}".replace("'", '"')
        )

    return parse


def number(kind, wanted, valid):
    def parse(text):
        try:
            value = kind(text)
            exact = (
                kind is float or isinstance(text, str) or value == text
            )  # a YAML file's 2.5 is no whole number
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is None or isinstance(text, bool) or not exact or not valid(value):
            raise argparse.ArgumentTypeError(f'"{text}" is not {wanted}')
        return value

    return parse


count = number(int, "a whole number of at least 1", lambda n: 1 <= n < 2**63)
count_or_0 = number(int, "a whole number of at least 0", lambda n: 0 <= n < 2**64)
whole = number(int, "a whole number", lambda n: True)
positive = number(float, "a number above 0", lambda x: math.isfinite(x) and x > 0)
not_negative = number(float, "a number of at least 0", lambda x: math.isfinite(x) and x >= 0)
share = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
momentum = number(float, "a number from 0 up to, not including, 1", lambda x: 0 <= x < 1)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence without sixty lines of usage before it."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

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
            flags = list(self._option_string_actions)
            what = "unknown option" if word.startswith("-") else "unexpected word"
            self.error(f"{what} {word}{nearest(word, flags)}")
        return args

    def options(self):
        return {a.dest: a for a in self._actions if a.dest not in ("help", "config_file")}
