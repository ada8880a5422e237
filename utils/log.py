"""The log of a run: on the terminal, above its progress bar, and in a file."""

import errno
import logging
import sys
from logging.handlers import MemoryHandler

from utils.dist import process_index
from utils.errors import fall_silent, printable


class PlainFormatter(logging.Formatter):
    """Names and values of files may hold a terminal's control sequences: they are shown, not obeyed."""

    def format(self, record):
        return printable(super().format(record), keep="\n\t")


class BarHandler(logging.StreamHandler):
    """Log lines on a terminal, written above the progress bar instead of through it. Where nobody reads any
    more, as after `| head`, the program goes on without them."""

    def emit(self, record):
        bar = sys.modules.get("tqdm")
        try:
            if bar is None:
                self.stream.write(self.format(record) + self.terminator)
            else:
                bar.tqdm.write(self.format(record), file=self.stream)
            self.stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            fall_silent(self.stream)


class LogFile(logging.FileHandler):
    """A full disk ends the run with the sentence of utils.errors, not with a traceback for each line."""

    def handleError(self, record):
        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)


def setup_logger(name):
    """The logger `name`, to the terminal; what it says is also held back for keep_log. Of several processes
    the main one tells the story, the others speak of trouble only."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO if process_index() == 0 else logging.WARNING)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(BarHandler(sys.stdout))
    logger.addHandler(MemoryHandler(1 << 20, flushOnClose=False))
    for handler in logger.handlers:
        handler.setFormatter(PlainFormatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    return logger


def keep_log(logger, path):
    """From here on the log also goes to a file, appended, with what was said before."""
    terminal, held = logger.handlers
    try:
        file = LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:  # a published run may lie in a read-only place: the terminal still has the table
        logger.warning(f"no log is kept at {path}: {error.strerror}")
        return
    file.setFormatter(terminal.formatter)
    held.setTarget(file)
    held.flush()
    logger.removeHandler(held)
    logger.addHandler(file)
