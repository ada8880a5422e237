"""The page of demo.py: a sentence in, persons out, and where each word looks. Needs Gradio.

The browser is sent small copies of pictures that the index names, never a file, and asks for them by their
place in the last result: no path that comes from outside is ever opened.
"""

import contextlib
import copy
import functools
import html
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from datasets.transforms import resize
from retrieval.contact_sheet import inside
from retrieval.encoders import checked_sentence, cut_notice, open_picture, shown
from retrieval.gallery import plural, unread_hint
from retrieval.index import GalleryIndex
from retrieval.pictures import Stamp
from retrieval.relevance import heat, word_maps, words_of
from utils.errors import InputError
from utils.extras import extra

THUMBNAIL = (192, 384)  # width, height
BOX = (4 * THUMBNAIL[0], THUMBNAIL[1])  # of a small copy
KEPT = 512  # small copies in memory, of 0.2 MB each, 0.9 MB at most
READERS = 4  # threads
SEARCHED = "the gallery is searched"
LONGEST = 20_000  # characters: one long "word" takes the tokeniser quadratic time
EXAMPLES = (
    "a woman in a red coat with a black handbag",
    "a man in a blue striped shirt, grey trousers and white sneakers",
    "a girl with long black hair who carries a yellow backpack",
)
CSS = """
footer {display: none !important}
.hint {color: var(--body-text-color-subdued)}
#heading, .hint {overflow-wrap: anywhere}
.toast-wrap {top: auto !important; bottom: var(--size-4)}  /* at the top a message covers Search */
#gallery .grid-wrap {max-height: none; height: auto; overflow: visible; padding-top: 0}
#gallery .grid-container {grid-template-columns:
  repeat(auto-fill, minmax(max(84px, (100% - 5 * var(--spacing-lg)) / 6), 1fr))}
#gallery .gallery-item, #gallery .thumbnail-lg {aspect-ratio: 2 / 5; height: auto}
#gallery .thumbnail-lg img {object-fit: contain; padding-bottom: 1.6em}
#gallery .caption-label {left: 0; right: 0; max-width: none; text-align: center; border: none}
"""

# what is written there from now on a screen reader says
SPOKEN = "() => document.querySelectorAll('#remark, #state').forEach(place => place.role = 'status')"


class Result(NamedTuple):
    """What a visitor saw last: kept on the server, a visitor each."""

    sentence: str
    pictures: list  # full paths, best first
    names: list  # the same as they are shown


class Page:
    """What the page's buttons do. index: the gallery of the command line; a visitor can bring an own one."""

    def __init__(self, encoders, index, top_k, max_pictures, duplicates=False):
        self.encoders, self.index, self.top_k, self.max_pictures = encoders, index, top_k, max_pictures
        self.duplicates = duplicates

    def heading(self, own=None):
        """What is searched, in Markdown."""
        pictures = plural(len(own or self.index), "picture")
        where = "of your own" if own else f"in {Path(self.index.gallery).name or self.index.gallery}"
        return f"## Find a person by a sentence\n{literal(f'{pictures} {where}')}"

    def search(self, sentence, own):
        """(Result, [(thumbnail, caption), …], remark)."""
        sentence = sentence or ""
        if len(sentence) > LONGEST:
            raise InputError(f"the sentence has {len(sentence)} characters; at most {LONGEST} are taken here")
        sentence = checked_sentence(sentence, "the sentence", self.encoders.tokenizer.plain)
        index, whose = (own, "your ") if own else (self.index, "")
        features = self.encoders.text_features([sentence])
        (answer,), lost = index.find(features, self.top_k, self.duplicates)
        paths = [os.path.join(index.gallery, name) for _, name, _ in answer]
        with ThreadPoolExecutor(READERS) as pool:
            copies = list(pool.map(small_copy_or_none, paths))
        tiles, pictures, names = [], [], []
        for (similarity, name, more), path, small in zip(answer, paths, copies, strict=True):
            if small is None:
                continue  # it has gone since the index was made
            same = f" · +{more}" if more else ""
            tiles.append((small, f"{len(tiles) + 1} · {similarity:.3f}{same}"))
            pictures.append(path)
            names.append(os.path.basename(name) if own else name)
        lost += len(answer) - len(tiles)
        remarks = [f"best of {whose}{plural(len(index), 'picture')}, with rank and similarity"]
        if not tiles:
            remarks = ["none of the pictures is there as it was when they were looked at"]
        elif lost:
            remarks.append(f"{plural(lost, 'picture')} gone or changed since left out")
        remarks += filter(None, [cut_notice(self.encoders, sentence)])
        return Result(sentence, pictures, names), tiles, "; ".join(remarks)

    def words(self, result):
        """[(word, its number), …]: what can be clicked."""
        words = words_of(result.sentence, self.encoders.tokenizer, self.encoders.text_length)
        return [(shown(word), number) for number, (word, _) in enumerate(words)]

    def look(self, result, place, number):
        """(Heat map of a word of the last sentence over a picture of the last result, the picture's name)."""
        if result is None or not 0 <= place < len(result.pictures):
            raise InputError("search first, then choose a picture and a word")
        path, name = result.pictures[place], shown(result.names[place])
        try:
            stamp = stamp_at(path)
            picture = small_copy(path, stamp)
            if number is None:
                return picture, name
            seen = as_the_model_sees(path, stamp, self.encoders.img_size)
        except (InputError, OSError):  # which names the folder too, and that is nobody's business here
            raise InputError(f"{name} can no longer be read: search again") from None
        if not 0 <= number < len(self.words(result)):
            raise InputError("that word is not of this sentence: choose one again")
        (word,) = word_maps(self.encoders, result.sentence, seen, numbers=[number])
        return heat(picture, word.map, THUMBNAIL[1]), name

    def upload(self, files, own=None):
        """An index of a visitor's own pictures, in memory only, and what is searched now.

        own: the visitor's index until now, which stays as it is; what it knows is not encoded again.
        """
        if not files:
            return None, SEARCHED
        if len(files) > self.max_pictures:
            raise InputError(
                f"that folder holds {len(files)} files; at most {self.max_pictures} are taken here"
            )
        found = {}
        for path in files:
            with contextlib.suppress(OSError):  # it is kept no longer
                found[path] = stamp_at(path)
        new = GalleryIndex(None, "", self.encoders.fingerprint, self.encoders.width)
        index = copy.deepcopy(own) if own else new
        index.update(found, self.encoders.encode_files)
        suffixes = {os.path.splitext(path)[1].lower() for path in found.keys() - index.pictures.keys()}
        hint = unread_hint(dict.fromkeys(suffixes - Image.registered_extensions().keys()))
        if not len(index):
            raise InputError(f"none of these files is a picture that can be read{hint}")
        left_out = len(set(files)) - len(index)
        left_out = f", {plural(left_out, 'file')} left out{hint}" if left_out else ""
        verb = "is" if len(index) == 1 else "are"
        return index, f"your {plural(len(index), 'picture')} {verb} searched{left_out}"


def stamp_at(path):
    """A file's Stamp, of size and time alone."""
    state = os.stat(path)
    return Stamp(state.st_size, state.st_mtime_ns)


@functools.lru_cache(KEPT)
def small_copy(path, stamp):
    """A picture inside BOX. stamp: of the file as it is now; one that has changed is read anew."""
    return inside(open_picture(path, BOX), BOX)


def small_copy_or_none(path):
    try:
        return small_copy(path, stamp_at(path))
    except (InputError, OSError):
        return None


@functools.lru_cache(KEPT)
def as_the_model_sees(path, stamp, img_size):
    """A picture of the model's size, with the very pixels that its features were made from."""
    pixels = resize(open_picture(path), img_size)  # [3, H, W]
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def build(page, examples, max_upload):
    """A gradio.Blocks. max_upload: MB of a file; told here, enforced by serve()."""
    gr = extra("gradio", "requirements-demo.txt")
    with gr.Blocks(title="IRRA", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        heading = gr.Markdown(page.heading(), elem_id="heading")
        with gr.Row(equal_height=True):
            sentence = gr.Textbox(
                label="Sentence",
                placeholder=EXAMPLES[0],
                max_lines=4,  # it grows; of a box with more lines at first, Enter would not start the search
                scale=5,
                elem_id="sentence",
                autofocus=True,
            )
            button = gr.Button("Search", variant="primary", scale=1, elem_id="search")
        gr.Examples([[shown(text)] for text in (examples or EXAMPLES)], [sentence], label="Examples")
        answer = lay_out_answer(gr)
        with gr.Accordion("Search your own pictures", open=False):
            gr.Markdown(
                f"A folder of at most {page.max_pictures} pictures, {max_upload} MB each. They are kept in "
                "temporary files of the computer that serves this page, for two hours at most; small copies "
                "stay in its memory until others take their place.",
                elem_classes="hint",
            )
            files = gr.File(label="Folder", file_count="directory", type="filepath", elem_id="folder")
            state = gr.Markdown(SEARCHED, elem_id="state", elem_classes="hint")
        connect(gr, page, (sentence, button), answer, (heading, files, state))
        gr.on([button.click, sentence.submit, files.upload], js=SPOKEN, api_visibility="private")
    return blocks


def lay_out_answer(gr):
    """What a search fills: (gallery, remark, words, picture, file)."""
    remark = gr.Markdown(elem_id="remark", elem_classes="hint")
    with gr.Row():
        gallery = gr.Gallery(
            show_label=False,
            height=None,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            scale=4,
            min_width=400,  # in a narrower window what the word looks at comes below, not beside one column
            elem_id="gallery",
        )
        with gr.Column(scale=1, min_width=240):
            picture = gr.Image(
                label="Where the word looks", interactive=False, buttons=[], height=400, elem_id="look"
            )
            words = gr.Radio(choices=[], label="Choose a picture, then a word", elem_id="words")
            file = gr.Textbox(label="File", interactive=False, elem_id="file")
    return gallery, remark, words, picture, file


def connect(gr, page, asked, answer, searched):
    """What happens on a click. asked: (sentence, button). answer: as lay_out_answer gives it. searched: the
    (heading, files, state) of what is searched."""
    (sentence, button), (gallery, _, words, picture, file), (heading, files, state) = asked, answer, searched
    result, place, own = gr.State(None), gr.State(0), gr.State(None)

    def guarded(function):
        """An input error becomes a sentence on the page."""

        def call(*inputs):
            try:
                return function(*inputs)
            except InputError as error:  # a toast is read as HTML
                raise gr.Error(html.escape(shown(error)), duration=8, print_exception=False) from None

        return call

    def answer_to(sentence, own):
        result, tiles, remark = page.search(sentence, own)
        choices = gr.Radio(choices=page.words(result), value=None)
        chosen = page.look(result, 0, None) if result.pictures else (None, "")
        return result, 0, gr.Gallery(value=tiles, selected_index=None), literal(remark), choices, *chosen

    def on_picture(result, number, event: gr.SelectData):
        return event.index, *guarded(page.look)(result, event.index, number)

    def on_files(files, own, result):
        """All that speaks of what is searched changes with it; the last sentence is asked again."""
        try:
            own, now = page.upload(files, own)
        except InputError as error:
            own, now = None, f"{error}; {SEARCHED}"
        nothing = None, 0, gr.Gallery(value=[]), "", gr.Radio(choices=[], value=None), None, ""
        return own, page.heading(own), literal(now), *(answer_to(result.sentence, own) if result else nothing)

    private = {"api_visibility": "private", "show_progress": "minimal"}
    found = [result, place, *answer]
    button.click(guarded(answer_to), [sentence, own], found, **private)
    sentence.submit(guarded(answer_to), [sentence, own], found, **private)
    gallery.select(on_picture, [result, words], [place, picture, file], **private)
    words.input(guarded(page.look), [result, place, words], [picture, file], **private)
    gr.on(
        [files.upload, files.delete, files.clear],
        guarded(on_files),
        [files, own, result],
        [own, heading, state, *found],
        trigger_mode="always_last",  # of several taken out in a row the last one counts
        **private,
    )


def literal(text):
    """Markdown that shows the text and does nothing else: no tag, no link, no picture, no emphasis."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in shown(text))


def serve(blocks, host, port, max_upload):
    """Listen. Nothing but the page is served: no folder is opened to it. Returns the address."""
    try:
        _, address, _ = blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,  # as an address writes IPv6
            server_port=port or port_to_listen_on(host, port),
            max_file_size=f"{max_upload}mb",
            allowed_paths=[],
            share=False,
            inbrowser=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            css=CSS,
            prevent_thread_lock=True,
        )
    except OSError as error:  # taken since it was found free
        raise cannot_listen(host, port, error) from None
    return address


def port_to_listen_on(host, port):
    """The port, or one that is free for 0; InputError where a page cannot be served there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one left a moment ago is free
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        raise cannot_listen(host, port, error) from None


def cannot_listen(host, port, error):
    why = error.strerror or "taken by now, or the server did not start within Gradio's five seconds"
    return InputError(f"cannot listen on {host}:{port} ({why}): give another --port or --host")
