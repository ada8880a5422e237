"""Find persons in a folder of pictures: `python search.py --config_file RUN --gallery FOLDER --query "…"`."""

import json
from pathlib import Path

from utils.errors import InputError, reports_errors, say, stop_like_an_interrupt
from utils.tool_options import search_args


@reports_errors
def main(argv=None):
    args = search_args(argv)
    stop_like_an_interrupt()  # an index keeps what has been encoded
    sentences = args.query + read_sentences(args.query_file)

    from retrieval.contact_sheet import Found, draw_contact_sheet, picture_format
    from retrieval.encoders import checked_sentence, cut_notice, open_picture, open_run, shown
    from retrieval.gallery import open_gallery
    from utils.extras import extra

    extra("faiss")
    sentences = [
        checked_sentence(sentence, f"query {number}", args.plain_captions)
        for number, sentence in enumerate(sentences, start=1)
    ]
    for path in args.image:
        open_picture(path)  # before the gallery is encoded: that may take long
    if args.save:
        picture_format(args.save)
    encoders = open_run(args)
    for sentence in sentences:
        if notice := cut_notice(encoders, sentence):
            say(notice)
    index = open_gallery(encoders, args, say)

    queries = [("query", sentence) for sentence in sentences] + [("image", path) for path in args.image]
    if not queries:
        say("no --query, --query_file or --image was given: the index is ready for one")
    answers = answers_of(index, encoders, sentences, args) if queries else []
    if args.json:
        print(json.dumps([as_record(*query, answer) for query, answer in zip(queries, answers, strict=True)]))
    else:
        for (_, query), answer in zip(queries, answers, strict=True):
            print(f"{shown(query)}\n{table(answer)}")
    if args.save and queries:
        titles = sentences + [f"similar to {shown(path)}" for path in args.image]
        found = [[Found(hit.path, hit.similarity, None, hit.copies) for hit in answer] for answer in answers]
        draw_contact_sheet(list(zip(titles, found, strict=True)), args.save)
        say(f"the result is drawn in {args.save}")


def answers_of(index, encoders, sentences, args):
    """[hits, best first] of each sentence, then of each --image; paths are whole."""
    import numpy as np

    from retrieval.gallery import plural

    features = [encoders.text_features(sentences)] if sentences else []
    if args.image:
        features.append(encoders.image_features([encoders.pixels(path) for path in args.image]))
    answers, lost = index.find(np.concatenate(features), args.top_k, args.duplicates)
    if lost:
        say(f"{plural(lost, 'picture')} gone or changed since just now: left out")
    return [[hit._replace(path=str(Path(index.gallery) / hit.path)) for hit in hits] for hits in answers]


def read_sentences(path):
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # not at what else may end a line
    except OSError as error:
        raise InputError(f"--query_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--query_file {path} is not a text file in UTF-8: save it as one") from None
    sentences = [line for line in lines if line.strip()]
    if not sentences:
        raise InputError(f"--query_file {path} holds no sentence: one a line is wanted")
    return sentences


def as_record(kind, query, answer):
    results = [
        {"rank": rank, "similarity": round(hit.similarity, 6), "file": hit.path, "copies": hit.copies}
        for rank, hit in enumerate(answer, start=1)
    ]
    return {kind: query, "results": results}


def table(answer):
    from prettytable import PrettyTable

    from retrieval.encoders import shown

    table = PrettyTable(["rank", "similarity", "file"], align="l")
    for rank, hit in enumerate(answer, start=1):
        table.add_row([rank, f"{hit.similarity:.4f}", shown(hit.path)])
        if hit.copies:
            table.add_row(["", "", f"and {hit.copies} {'copy' if hit.copies == 1 else 'copies'}"])
    return table


if __name__ == "__main__":
    raise SystemExit(main())
