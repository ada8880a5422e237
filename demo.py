"""A page to search a gallery in the browser: `python demo.py --config_file RUN --gallery FOLDER`."""

import os
import sys
import tempfile

from utils.errors import reports_errors
from utils.tool_options import demo_args


@reports_errors
def main(argv=None):
    args = demo_args(argv)
    with tempfile.TemporaryDirectory(prefix="irra-page-") as folder:
        # read when Gradio is imported: no statistics, no hub; what visitors upload goes when the page ends
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", GRADIO_TEMP_DIR=folder)
        serve_page(args)


def serve_page(args):
    from retrieval.encoders import open_run
    from retrieval.gallery import open_gallery
    from retrieval.page import Page, build, gallery_title, serve
    from utils.extras import extra

    extra("faiss")
    extra("gradio", "requirements-demo.txt")
    encoders = open_run(args)
    index = open_gallery(encoders, args, say)
    page = Page(encoders, index, args.top_k, args.max_pictures)
    blocks = build(page, gallery_title(index), args.example, args.max_upload)
    address = serve(blocks, args.host, args.port, args.max_upload)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"--host {args.host}: everybody who can reach this machine can now search these pictures")
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


def say(line):
    print(line, file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
