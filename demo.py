"""A page to search a gallery in the browser: `python demo.py --config_file RUN --gallery FOLDER`."""

import os
import shutil
import tempfile
from pathlib import Path

from utils.errors import reports_errors, say, stop_like_an_interrupt
from utils.tool_options import search_args

PREFIX = "irra-page-"  # of folders for uploaded pictures, followed by the number of the process


@reports_errors
def main(argv=None):
    args = search_args(argv, "demo")
    stop_like_an_interrupt()  # visitors' pictures do not stay
    remove_pictures_of_dead_pages()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as folder:
        settle_environment(folder)
        serve_page(args)


def settle_environment(folder):
    """What Gradio reads when it is imported. folder: for what visitors upload; it goes when the page ends.

    No statistics, no hub, no history of runs kept there. What is meant for other Gradio programs, as
    GRADIO_ALLOWED_PATHS, opens nothing here. And no proxy: when it starts, Gradio asks its own server
    whether it is there, and a proxy would not find that.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_") and name != "GRADIO_ROOT_PATH"]:
        del os.environ[name]
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_RUN_HISTORY="False",
        GRADIO_TEMP_DIR=folder,
        HF_HUB_OFFLINE="1",
        NO_PROXY="*",
        no_proxy="*",
    )


def remove_pictures_of_dead_pages():
    """What visitors uploaded to a page that was killed."""
    from utils.files import lives

    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not lives(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def serve_page(args):
    from retrieval.encoders import open_run
    from retrieval.gallery import open_gallery
    from retrieval.page import Page, build, port_to_listen_on, serve
    from utils.extras import extra

    extra("faiss")
    extra("gradio", "requirements-demo.txt")
    port_to_listen_on(args.host, args.port)  # before the gallery is encoded: that may take long
    encoders = open_run(args)
    index = open_gallery(encoders, args, say)
    page = Page(encoders, index, args.top_k, args.max_pictures, args.duplicates)
    blocks = build(page, args.example, args.max_upload)
    address = serve(blocks, args.host, args.port, args.max_upload)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"--host {args.host}: everybody who can reach this machine can now search these pictures")
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    raise SystemExit(main())
