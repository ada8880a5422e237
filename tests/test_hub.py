"""--pretrain_choice by name: OpenAI's in both spellings, repositories of a hub that tests serve, folders."""

import http.server
import threading

import pytest
import torch
from huggingface_hub import constants

from model.fetch import HUB, in_folder, is_hub_name, locate, openai_name
from model.pretrained import load_clip
from tests.test_weights import SQUARE, configured, reference, transformers_folder, weights_of, with_config
from utils.errors import InputError

REPOSITORY = "someone/person-clip"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of a hub that downloads ask: HEAD and GET of ORG/NAME/resolve/main/FILE, from a folder."""

    folder, asked, broken = None, [], False

    def answer(self, body=True):
        prefix = f"/{REPOSITORY}/resolve/main/"
        path = self.folder / self.path.removeprefix(prefix)
        if not self.path.startswith(prefix) or not path.is_file():
            self.send_response(404)
            kind = "EntryNotFound" if self.path.startswith(f"/{REPOSITORY}/") else "RepoNotFound"
            self.send_header("X-Error-Code", kind)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = path.read_bytes()
        if body:
            self.asked.append(path.name)
        self.send_response(200)
        for name, value in (("ETag", f'"{path.name}-1"'), ("X-Repo-Commit", "c" * 40)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if self.broken else data)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer()

    def log_message(self, *args):
        pass


def serve(monkeypatch, port):
    """What HF_ENDPOINT does before the client is loaded."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch, cache):
    """A hub on this machine with one repository, of the files in hub.folder; hub.asked: what was fetched."""
    handler = type("Handler", (Hub,), {"folder": tmp_path / "repository", "asked": []})
    handler.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    serve(monkeypatch, server.server_port)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_network(cache, monkeypatch, closed_port):
    serve(monkeypatch, closed_port)


@pytest.mark.parametrize("choice", [f"{HUB}{REPOSITORY}", REPOSITORY])
def test_a_repository_of_open_clip_is_fetched_once_and_with_its_config(choice, hub):
    with_config(weights_of(reference(gelu=True)), hub.folder, "open_clip_model.safetensors", gelu=True)
    (hub.folder / "open_clip_pytorch_model.bin").write_bytes(b"the same once more")
    for _ in range(2):
        assert load_clip(choice, SQUARE, 16).facts["activation"] == "gelu"
    assert sorted(hub.asked) == ["open_clip_config.json", "open_clip_model.safetensors"]


def test_a_repository_of_transformers_in_several_files(hub):
    weights = weights_of(reference())
    transformers_folder(weights, hub.folder, files=3)
    clip = load_clip(REPOSITORY, SQUARE, 16)
    assert torch.equal(clip.visual.proj, weights["visual.proj"])
    assert len(hub.asked) == 5  # config, index and three files


def test_another_model_is_refused_before_its_weights_are_fetched(hub):
    configured(dict(timm_model_name="vit_base_patch16_siglip_224"))(hub.folder)
    (hub.folder / "clip.pt").rename(hub.folder / "open_clip_model.safetensors")
    with pytest.raises(
        InputError, match=f"{HUB}{REPOSITORY} is refused: .*timm_model_name: vit_base_patch16_siglip"
    ):
        load_clip(REPOSITORY, SQUARE, 16)
    assert hub.asked == ["open_clip_config.json"]


def test_what_is_in_the_cache_needs_no_network(hub, monkeypatch, closed_port):
    with_config(weights_of(reference()), hub.folder, "open_clip_pytorch_model.bin")
    path = locate(REPOSITORY)
    serve(monkeypatch, closed_port)
    assert locate(REPOSITORY) == path


def one_sentence(choice, *parts):
    with pytest.raises(InputError) as refusal:
        locate(choice)
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


def test_without_a_network_the_file_to_fetch_by_hand_is_named(no_network, cache):
    address = f"{constants.ENDPOINT}/{REPOSITORY}/resolve/main/open_clip_model.safetensors"
    one_sentence(REPOSITORY, "cannot fetch", address, "open_clip_config.json or config.json", "their folder")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_download_that_breaks_off_is_no_weights_and_the_next_try_ends_it(hub, cache):
    with_config(weights_of(reference()), hub.folder, "open_clip_model.safetensors")
    hub.broken = True
    one_sentence(REPOSITORY, "cannot fetch")
    assert not list(cache.rglob("open_clip_model.safetensors"))
    hub.broken = False
    assert load_clip(REPOSITORY, SQUARE, 16)


def test_a_repository_without_weights_and_one_that_is_not_there(hub):
    one_sentence(REPOSITORY, "holds none of open_clip_model.safetensors")
    one_sentence(f"{HUB}nobody/nothing", "has no such repository")
    one_sentence(f"{HUB}not a name", "ORGANISATION/NAME")


def test_a_gated_repository_says_what_to_do(hub, monkeypatch):
    def gated(self, body=True):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    monkeypatch.setattr(hub, "answer", gated)
    one_sentence(REPOSITORY, "hf auth login")


# ---- words that are no repository ----


def test_openais_names_have_two_spellings():
    assert openai_name("ViT-B-16") == openai_name("ViT-B/16") == "ViT-B/16"
    assert openai_name("RN50x4") == "RN50x4" and openai_name("ViT-B-17") is None


def test_a_mistyped_path_or_model_never_asks_the_hub(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.chdir(tmp_path)
    for word in ("weights/nam.pth", "logs/run", "ViT-B/17", "vit-b/16", "RN50/x", "a/b/c", "../x", "clip"):
        assert not is_hub_name(word), word
        one_sentence(word, f"{word} is neither a file nor one of RN50", "random")
    assert is_hub_name("openai/clip-vit-base-patch16") and is_hub_name(
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"
    )


def test_a_folder_is_asked_for_the_file_that_its_library_writes(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert in_folder(tmp_path).name == "model.safetensors"
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    assert in_folder(tmp_path).name == "open_clip_pytorch_model.bin"
