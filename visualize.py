"""Pictures of a run: `python visualize.py --config_file RUN --worst 20 --cmc`, and see --help."""

import os
from pathlib import Path

from utils.data_sets import name_of
from utils.errors import InputError, printable, reports_errors
from utils.files import make_folder
from utils.options import other_set
from utils.run_folders import results_of
from utils.tool_options import visualize_args


@reports_errors
def main(argv=None):
    args = visualize_args(argv)
    folder = Path(args.output or (pictures_folder(args) if args.run_dir else "."))
    make_folder(folder, "--output")
    written = []
    if args.curves:
        from retrieval.curves import draw_curves

        written.append(folder / "curves.png")
        draw_curves(args.curves, written[-1])
    if args.words is not None:
        written.append(words(args, folder))
    if args.cmc or args.queries or args.worst or args.best or args.random:
        written += split_pictures(args, folder)
    for path in written:
        print(printable(str(path)))


def pictures_folder(args):
    """pictures in the run's folder; of another checkpoint or data set those have a folder of their own, as
    test.py's results have a file."""
    name = results_of(args.run_dir, args.checkpoint).replace("results", "pictures", 1)
    return Path(args.run_dir) / f"{name}{other_set(args)}"


def words(args, folder):
    """Draw where the words look; returns the file."""
    from retrieval.contact_sheet import save_picture
    from retrieval.encoders import checked_sentence, cut_notice, open_picture, open_run
    from retrieval.relevance import draw_word_maps, word_maps

    sentence = checked_sentence(args.words, "--words", args.plain_captions)
    picture = open_picture(args.image)
    encoders = open_run(args)
    if notice := cut_notice(encoders, sentence):
        print(printable(notice))
    name = Path(args.image).stem
    if len(os.fsencode(name)) > 240:  # together it would be longer than file systems take
        name = name[:60]
    path = folder / f"words_{name}.png"
    save_picture(draw_word_maps(picture, word_maps(encoders, sentence, picture, args.words_by)), path)
    return path


def split_pictures(args, folder):
    """Draw the CMC curve and single queries, which share the features of the split; returns the files."""
    from datasets import build_dataloader
    from processor.evaluator import encode
    from retrieval.contact_sheet import gallery_paths, query_rows, save_picture
    from retrieval.curves import draw_cmc
    from retrieval.encoders import open_run
    from retrieval.queries import choose, draw_query, outcomes
    from utils.device import out_of_memory
    from utils.extras import extra
    from utils.log import setup_logger
    from utils.metrics import rank_features

    if args.cmc:
        extra("matplotlib")  # before the split is encoded
    setup_logger("IRRA")
    img_loader, txt_loader, _ = build_dataloader(args)
    captions = txt_loader.dataset.captions
    if args.queries and max(args.queries) >= len(captions):
        raise InputError(
            f"--queries: there is no query {max(args.queries)}, the {args.split} split has {len(captions)}, "
            "from 0"
        )
    encoders = open_run(args)
    with out_of_memory(encoders.device, args.test_batch_size, "--test_batch_size"):
        features = encode(encoders.model, img_loader, txt_loader, encoders.device, progress=True)
    text, text_pids, image, image_pids = features
    written = []
    if args.cmc:
        t2i = rank_features(text, image, text_pids, image_pids, min(50, len(image))).cmc.tolist()
        i2t = rank_features(image, text, image_pids, text_pids, min(50, len(text))).cmc.tolist()
        title = f"{args.name} on {name_of(args)}, {args.split} split"
        written.append(folder / f"cmc_{args.split}.png")
        draw_cmc({"text to image": t2i, "image to text": i2t}, title, written[-1])
    if not (args.queries or args.best or args.worst or args.random):
        return written
    outcome, paths = outcomes(features), gallery_paths(img_loader.dataset, [img_loader.left_out])
    queries = [*(args.queries or []), *choose(outcome, args.best, args.worst, args.random, args.seed)]
    queries = list(dict.fromkeys(queries))  # each once
    ranking = rank_features(text, image, text_pids, image_pids, 10)
    rows = query_rows(features, ranking.indices, paths, captions, queries)
    for query, (sentence, found) in zip(queries, rows, strict=True):
        pid = int(text_pids[query])
        right = [paths[row] for row in (image_pids == pid).nonzero()[:, 0].tolist()]
        rank, person = int(outcome.first_rank[query]), img_loader.person(pid)
        note = f"the first right one at rank {rank}, query {query}, person {person}"
        written.append(folder / f"query_{args.split}_{query:05d}.png")
        save_picture(draw_query(sentence, right, found, note), written[-1])
    return written


if __name__ == "__main__":
    raise SystemExit(main())
