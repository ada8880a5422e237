"""Evaluate a run of ours or a published one: `python test.py --config_file RUN/configs.yaml`."""

import json
from pathlib import Path

from utils.errors import reports_errors
from utils.options import get_test_args, read_run_options


@reports_errors
def main(argv=None):
    args = get_test_args(argv)
    from utils.dist import out_of_memory, pick_device, process_group

    device = pick_device(args.device)
    with process_group(device), out_of_memory(device, args.test_batch_size):
        test(args, device)


def test(args, device):
    from datasets import build_dataloader
    from model.build import build_trained_model
    from processor.evaluator import chance, encode, evaluate, log_table
    from utils.checkpoint import load_checkpoint
    from utils.dist import from_all, rank
    from utils.files import write_whole
    from utils.run import keep_log, setup_logger

    run = Path(args.run_dir)
    logger = setup_logger("IRRA")
    if rank() == 0:
        keep_log(logger, run / "test_log.txt")
    logger.info(str({key: value for key, value in sorted(vars(args).items()) if key != "notes"}))
    checkpoint = Path(args.checkpoint or run / "best.pth")
    img_loader, txt_loader, _ = build_dataloader(args)
    state = load_checkpoint(checkpoint)
    model = build_trained_model(args, state["model"], checkpoint)
    logger.getChild("test").info("Enter inferencing")
    features = encode(model, img_loader, txt_loader, device, progress=True)
    rows, ranking = evaluate(features, args.i2t)
    if args.chance:
        rows["chance"] = chance(features)
    log_table(rows)
    left_out = {row for part in from_all(img_loader.left_out) for row in part}
    if rank():  # several processes share the work; one writes
        return

    results = {
        "dataset_name": args.dataset_name,
        "split": args.split,
        "checkpoint": str(checkpoint),
        "epoch": state.get("epoch"),
        "queries": len(features.text),
        "gallery": len(features.image),
        **rows,
    }
    target = run / results_name(args, run)
    write_whole(target, json.dumps(results, indent=1) + "\n")
    logger.getChild("test").info(f"results are in {target}")
    if args.picture:
        gallery = [row for row in range(len(img_loader.dataset)) if row not in left_out]
        draw_queries(features, ranking, img_loader.dataset, gallery, txt_loader.dataset, args.picture)
        logger.getChild("test").info(f"queries and their ten best images are drawn in {args.picture}")


def results_name(args, run):
    """results.json for the run's own data set; another data set or split has a file of its own."""
    own = args.dataset_name == read_run_options(run / "configs.yaml").dataset_name and args.split == "test"
    return "results.json" if own else f"results_{args.dataset_name}_{args.split}.json"


def draw_queries(features, ranking, images, gallery, captions, path, number=6):
    """Some queries, spread evenly over the split, with what was found for each. gallery: of each image in
    features, its row in the split."""
    from retrieval.contact_sheet import Found, draw_contact_sheet

    rows = []
    for step in range(min(number, len(captions))):
        query = step * len(captions) // min(number, len(captions))
        best = ranking.indices[query].tolist()
        similarity = (features.image[best] @ features.text[query]).tolist()
        found = [
            Found(images.image_paths[gallery[i]], s, images.pids[gallery[i]] == captions.pids[query])
            for i, s in zip(best, similarity, strict=True)
        ]
        rows.append((captions.captions[query], found))
    draw_contact_sheet(rows, path)


if __name__ == "__main__":
    raise SystemExit(main())
