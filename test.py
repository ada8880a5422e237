"""Evaluate a run of ours or a published one: `python test.py --config_file RUN/configs.yaml`."""

import json
from pathlib import Path

from utils.data_sets import name_of
from utils.errors import InputError, reports_errors
from utils.files import make_folder, write_whole
from utils.options import get_test_args, other_set, passed_over
from utils.run_folders import results_of


@reports_errors
def main(argv=None):
    args = get_test_args(argv)
    from utils.device import out_of_memory, pick_device
    from utils.process_group import process_group

    device = pick_device(args.device)
    with process_group(device), out_of_memory(device, args.test_batch_size, "--test_batch_size"):
        test(args, device)


def test(args, device):
    from datasets import build_dataloader
    from model.build import build_trained_model
    from processor.evaluator import encode, evaluate, log_table
    from retrieval.contact_sheet import draw_contact_sheet, gallery_paths, picture_format, query_rows, spread
    from utils.checkpoint import load_checkpoint
    from utils.dist import from_all, process_index
    from utils.log import keep_log, setup_logger

    run = Path(args.run_dir)
    logger = setup_logger("IRRA")
    if args.output:
        make_folder(args.output, "--output")
    if args.picture:
        picture_format(args.picture)  # before the evaluation: that may take long
    if process_index() == 0:
        keep_log(logger, Path(args.output or run) / "test_log.txt")
    logger.info(str(dict(sorted(vars(args).items()))))
    if sentence := passed_over(args.config_file, vars(args)):
        logger.info(sentence)
    checkpoint = Path(args.checkpoint or run / "best.pth")
    img_loader, txt_loader, _ = build_dataloader(args)
    state = load_checkpoint(checkpoint)
    model = build_trained_model(args, state["model"], checkpoint, state.get("clip"))
    logger.getChild("test").info("Enter inferencing")
    features = encode(model, img_loader, txt_loader, device, progress=True)
    rows, ranking = evaluate(features, args.i2t)
    rows.update(more_rows(args, model, features))
    log_table(rows)
    left_out = from_all(img_loader.left_out)
    if process_index():  # several processes share the work; one writes
        return

    results = {
        "dataset_name": name_of(args),
        "split": args.split,
        "checkpoint": str(checkpoint),
        "epoch": state.get("epoch"),
        "queries": len(features.text),
        "gallery": len(features.image),
        **rows,
    }
    keep_results(results, Path(args.output or run) / results_name(args, run, checkpoint), logger)
    if args.picture:
        paths, captions = gallery_paths(img_loader.dataset, left_out), txt_loader.dataset.captions
        queries = spread(len(captions), 6)
        draw_contact_sheet(query_rows(features, ranking.indices, paths, captions, queries), args.picture)
        logger.getChild("test").info(f"queries and their ten best images are drawn in {args.picture}")


def more_rows(args, model, features):
    """Of the table: a random order, and each of several embeddings by itself."""
    from processor.evaluator import chance, evaluate

    rows = {"chance": chance(features)} if args.chance else {}
    for name, columns in model.embeddings().items() if args.all_embeddings else ():
        of_one, _ = evaluate(features.of(columns), args.i2t)
        rows.update({f"{task}, {name}": row for task, row in of_one.items()})
    return rows


def keep_results(results, target, logger):
    """The table has been printed: where the results cannot be kept, the rest goes on all the same."""
    log = logger.getChild("test")
    try:
        write_whole(target, json.dumps(results, indent=1) + "\n")
        log.info(f"results are in {target}")
    except InputError as error:
        log.warning(f"the results are not kept ({error}): --output FOLDER says where they may go")


def results_name(args, run, checkpoint):
    """results.json is of the run's best.pth on its own data set; another one has a file of its own."""
    what = f"_{name_of(args)}_{args.split}" if other_set(args) or args.split != "test" else ""
    return f"{results_of(run, checkpoint)}{what}.json"


if __name__ == "__main__":
    raise SystemExit(main())
