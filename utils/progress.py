"""Progress bars: on a terminal, and of several processes by the main one."""

from utils.dist import process_index


def progress_bar(total, what, shown=True, **more):
    """tqdm's bar of `total` steps; more: its other arguments."""
    from tqdm import tqdm

    hidden = None if shown and process_index() == 0 else True  # None: where there is no terminal
    return tqdm(total=total, desc=what, leave=False, disable=hidden, **more)
