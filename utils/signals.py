"""The signals that end a run in good order."""

import signal

from utils.errors import STOPS, may_ask_for_signals
from utils.process_group import launched


class Stopped(Exception):
    """A signal asked the run to end, and everything is saved."""


class StopSignals:
    """While it lasts, the signals of STOPS, SIGHUP when a terminal goes, only set `asked`; a second one
    interrupts at once. One that is ignored, as SIGHUP under nohup, stays so.

    Not under torchrun: a batch system signals it and its processes, and it passes the signal on to them. It
    kills those that are not done in time.
    """

    def __init__(self, logger):
        self.asked, self.again, self.logger = False, False, logger

    def __enter__(self):
        heeded = [n for n in STOPS if may_ask_for_signals() and signal.getsignal(n) != signal.SIG_IGN]
        self.earlier = {number: signal.signal(number, self.ask) for number in heeded}
        return self

    def ask(self, number, frame):
        if self.asked:
            if launched():
                return
            self.again = True
            raise KeyboardInterrupt
        self.asked = True
        again = "" if launched() else " (again: stop at once, unsaved)"
        self.logger.info(f"{signal.Signals(number).name}: finishing the batch, then saving{again}")

    def __exit__(self, kind, error, trace):
        has_to_speak = launched() and isinstance(error, Exception) and not isinstance(error, Stopped)
        for number, handler in self.earlier.items():
            # torchrun sends SIGTERM to all when one has ended: each must still be able to say why it ends
            signal.signal(number, signal.SIG_IGN if has_to_speak and number == signal.SIGTERM else handler)
