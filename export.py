"""A run's two encoders for other programs: `python export.py RUN --format safetensors|onnx|open_clip`."""

from pathlib import Path

from utils.errors import printable, reports_errors, stop_like_an_interrupt
from utils.tool_options import export_args


@reports_errors
def main(argv=None):
    args = export_args(argv)
    stop_like_an_interrupt()  # nothing half-written stays

    from retrieval.encoders import open_run
    from retrieval.export import export

    what = args.format if args.checkpoint is None else f"{args.format}_{Path(args.checkpoint).stem}"
    folder = Path(args.output or Path(args.run_dir) / "export" / what)
    difference = export(open_run(args), args, args.format, folder)
    print(f"{printable(str(folder))} is done; its features differ from the run's by {difference:.1e} at most")


if __name__ == "__main__":
    raise SystemExit(main())
