"""What goes wrong through input ends in one sentence: what, where, what to do next."""

import errno
import functools
import getpass
import os
import signal
import sys
import threading
import traceback
import unicodedata

STOPS = [  # of a terminal, of the system, and what batch systems announce an end with
    getattr(signal, name)
    for name in "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2 SIGXCPU".split()
    if hasattr(signal, name)
]
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_ANSWER = tuple(  # of a disk that does not answer: one of a network, of FUSE, or a broken one
    getattr(errno, name)
    for name in "EIO ESTALE ENOTCONN ETIMEDOUT EHOSTDOWN EHOSTUNREACH EREMOTEIO ENODEV ENXIO".split()
    if hasattr(errno, name)
)
NO_TEMPORARY_FOLDER = "nothing can be written to TMPDIR or /tmp: set TMPDIR to a folder for temporary files"
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line and paragraph ends
BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder what is read


class InputError(Exception):
    """Something the user can mend; its text is the whole message."""

    of_disk = False  # of all files that are there, not of this one alone

    def __init__(self, message=""):
        if "Original Traceback" in message:  # so PyTorch raises a loading process's error again
            self.__cause__ = RuntimeError(message)  # for --debug
            message = message.rsplit("InputError: ", 1)[-1].strip()
        super().__init__(printable(message))


def first_line(error):
    """What an error says, cut to a part of a sentence; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def say(sentence):
    """What is no result and no log holds: to stderr, so that results can be piped."""
    print(printable(sentence), file=sys.stderr)


say_once = functools.cache(say)  # the same sentence not twice


def printable(text, keep=""):
    """The text on one line: file names and records may hold line ends and a terminal's control sequences.
    keep: such characters that stay."""
    return "".join(
        c.encode("unicode_escape").decode()
        if c not in keep and (c in BIDI or unicodedata.category(c) in UNPRINTABLE)
        else c
        for c in text
    )


def ready_output():
    """From here on no letter ends the program: one that the encoding of the output lacks is escaped. What
    was closed leads nowhere; else the next file that is opened would get what libraries write there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
            os.set_inheritable(number, True)
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(
            stream, "reconfigure"
        ):
            stream.reconfigure(errors="backslashreplace")


def name_user():
    """A container that is run with --user N has no name for it, and several versions of PyTorch, from 2.8 on,
    ask for one when an optimiser is made."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def fall_silent(stream):
    """Nobody reads it any more: what is still to come, from its buffer too, leads nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def may_ask_for_signals():
    """Python lets the main thread do so only; a program that others run in a thread goes without."""
    return threading.current_thread() is threading.main_thread()


def stop_like_an_interrupt():
    """From here on all of STOPS end the program as Ctrl-C does, and keep what it keeps. One that is ignored,
    as SIGHUP under nohup, stays so."""
    for number in STOPS if may_ask_for_signals() else ():
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def reports_errors(main):
    """Wrap a `main(argv) -> exit status`: input errors become one line on stderr and status 2."""

    @functools.wraps(main)
    def run(argv=None):
        arguments = sys.argv[1:] if argv is None else argv
        ready_output()
        name_user()
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `python test.py … | head`
            fall_silent(sys.stdout)
            return 1
        except Exception as error:
            sentence = sentence_of(error)
            if not sentence:
                raise
            if "--debug" in arguments:
                traceback.print_exc()
            print(f"error: {sentence}", file=sys.stderr)
            return 2

    return run


def sentence_of(error):
    """What the user is told of an error; None of a fault of the code, whose traceback says more."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        if not error.name or "." in error.name:  # a damaged installation: where it fails is what counts
            return None
        return (
            f"the package {error.name} is not installed for {sys.executable}: "
            "python -m pip install -r requirements.txt"
        )
    # of a log or TensorBoard's file; checkpoints say more (utils.files)
    return of_the_system(error) if isinstance(error, OSError) else None


def of_the_system(error):
    """The sentence of an OSError that a disk or its rights explain; None of any other."""
    if "No usable temporary directory" in str(error):
        return NO_TEMPORARY_FOLDER
    name = printable(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else ""
    again = "start again (a training goes on from its last checkpoint with --resume)"
    if error.errno in NO_ROOM:
        return f"cannot write{f' to {name}' if name else ''}: {error.strerror}; make room there and {again}"
    if error.errno in NO_ANSWER:
        return f"{name or 'a file'}: {error.strerror}; see that its disk is there, and {again}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{name or 'a file'}: {error.strerror}; raise the limit (ulimit -n 4096)"
    if name and error.errno in (errno.EACCES, errno.EPERM):
        return f"{name}: {error.strerror}; give this user the right to it, or name another place"
    if name and error.errno == errno.ENAMETOOLONG:
        return f"{name[:80]}…: {error.strerror}"
    return None
