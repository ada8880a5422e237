"""What goes wrong through input ends in one sentence: what, where, what to do next."""

import functools
import os
import sys
import traceback


class InputError(Exception):
    """Something the user can mend; its text is the whole message."""


def reports_errors(main):
    """Wrap a `main(argv) -> exit status`: input errors become one line on stderr and status 2."""

    @functools.wraps(main)
    def run(argv=None):
        arguments = sys.argv[1:] if argv is None else argv
        try:
            return main(argv) or 0
        except InputError as error:
            if "--debug" in arguments:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `python test.py … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return run
