"""CLIP's weights: read from any kind of file without running code, fetched with a checksum, fitted."""

import hashlib
import http.server
import os
import pickle
import signal
import threading
import urllib.error
import zipfile

import open_clip
import pytest
import torch
from torch import nn

from model import build_model
from model.fetch import CHECKPOINTS, download
from model.pretrained import load_clip, resize_positions
from model.weights_file import named_tensors, read_file
from tests.recipe import POCKET, clip_weights, tiny_args
from utils.errors import InputError

# OpenAI's archives are of that kind
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


def read_weights(path):
    """{name: tensor} of a file of weights."""
    return named_tensors(read_file(path), path)[0]


@pytest.fixture(scope="module")
def weights():
    return clip_weights(**POCKET)


def same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


# ---- TorchScript archives, such as OpenAI's ----


class Branch(nn.Module):
    pass


class Root(nn.Module):
    def forward(self, x):
        return x + 1


def module_of(weights):
    """A module whose state dict is `weights`: a.b.c is parameter c of module b of module a."""
    root = Root()
    for key, value in weights.items():
        *path, name = key.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Branch())
            node = getattr(node, part)
        if value.is_floating_point():
            node.register_parameter(name, nn.Parameter(value))
        else:
            node.register_buffer(name, value)
    return root


def openais(weights):
    """As OpenAI's archives hold them: halves but for the norms, and some numbers that IRRA has no use for."""
    halves = {
        key: value if ".ln_" in key or key.startswith("ln_") else value.half()
        for key, value in weights.items()
    }
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    return {**halves, **sizes, "vocab_size": torch.tensor(49408), "logit_scale": torch.tensor(4.6052)}


@pytest.fixture(scope="module")
def archive(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "ViT-tiny.pt"
    module = torch.jit.trace(module_of(openais(weights)), torch.zeros(1))
    torch.jit.save(module, path)
    return path


def test_a_torchscript_archive_gives_its_tensors(archive, weights):
    same(read_weights(archive), openais(weights))
    same(read_weights(archive), dict(torch.jit.load(archive, map_location="cpu").state_dict()))


def test_a_scripted_archive_and_transposed_tensors_are_read_too(tmp_path):
    odd = {
        "a.0.weight": torch.arange(12.0).reshape(3, 4).t(),
        "a.0.none": torch.zeros(0, 3),
        "b": torch.tensor(7),
    }
    torch.jit.save(torch.jit.script(module_of(odd)), tmp_path / "odd.pt")
    same(read_weights(tmp_path / "odd.pt"), odd)


def test_an_archive_becomes_a_clip_in_fp32(archive, weights):
    clip = load_clip(str(archive), (32, 32), 16)
    expected = {key: value.float() for key, value in openais(weights).items() if key in weights}
    same(clip.state_dict(), expected)


def test_an_archives_program_is_never_compiled(archive, weights, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the archive's code was about to run")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    monkeypatch.setattr(torch._C, "import_ir_module", forbidden)
    same(read_weights(archive), openais(weights))


class Payload:
    """Whoever unpickles this makes the folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_an_archive_that_carries_code_is_refused_and_the_code_does_not_run(archive, tmp_path):
    bad, marker = tmp_path / "bad.pt", tmp_path / "it ran"
    trap = pickle.dumps(Payload(marker), protocol=2)
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(bad, "w") as file:
        for name in good.namelist():
            file.writestr(name, trap if name.endswith("/data.pkl") else good.read(name))
    with pytest.raises(InputError, match="bad.pt"):
        load_clip(str(bad), (32, 32), 16)
    assert not marker.exists()
    pickle.loads(trap)  # it is a real one
    assert marker.exists()


class Ring:
    """An attribute tree that holds itself."""


@pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="needs an alarm by seconds of CPU")
def test_an_archive_without_end_is_refused_in_finite_time(archive, tmp_path):
    class TookTooLong(BaseException):
        pass

    def give_up(*_):
        raise TookTooLong

    ring = Ring()
    ring.itself = ring
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(tmp_path / "ring.pt", "w") as file:
        for name in good.namelist():
            endless = name.endswith("/data.pkl")
            file.writestr(name, pickle.dumps(ring, protocol=2) if endless else good.read(name))
    ended, before = None, signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, 5)
    try:
        load_clip(str(tmp_path / "ring.pt"), (32, 32), 16)
    except (InputError, TookTooLong) as error:
        ended = type(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert ended is InputError


# ---- state dicts ----


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_state_dict_gives_its_tensors(suffix, weights, tmp_path):
    torch.save(weights, tmp_path / f"clip{suffix}")
    same(read_weights(tmp_path / f"clip{suffix}"), weights)


@pytest.mark.parametrize("kind", ["zip", "old pickle"])
def test_a_state_dict_that_carries_code_is_refused_and_the_code_does_not_run(kind, weights, tmp_path):
    path, marker = tmp_path / "clip.pt", tmp_path / "it ran"
    bad = {"text_projection": weights["text_projection"], "extra": Payload(marker)}
    torch.save(bad, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InputError, match="clip.pt is refused: it is damaged or holds more than weights"):
        read_weights(path)
    assert not marker.exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(InputError, match="list.pt is not a state dict of CLIP"):
        read_weights(tmp_path / "list.pt")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt holds no CLIP model"):
        load_clip(str(tmp_path / "other.pt"), (32, 32), 16)


@pytest.mark.parametrize(
    "key", ["visual.class_embedding", "transformer.resblocks.0.ln_1.bias", "visual.proj"]
)
def test_a_missing_weight_is_named(key, weights, tmp_path):
    torch.save({name: value for name, value in weights.items() if name != key}, tmp_path / "clip.pt")
    with pytest.raises(InputError, match=key):
        load_clip(str(tmp_path / "clip.pt"), (32, 32), 16)


def test_a_misshapen_weight_is_named_with_both_shapes(weights, tmp_path):
    torch.save({**weights, "visual.ln_pre.bias": torch.zeros(63)}, tmp_path / "clip.pt")
    with pytest.raises(InputError, match=r"visual.ln_pre.bias is \[63\], not \[64\]"):
        load_clip(str(tmp_path / "clip.pt"), (32, 32), 16)


@pytest.mark.parametrize("sizes", [dict(vision_width=32), dict(text_width=32)], ids=str)
def test_a_width_that_heads_of_64_do_not_divide_is_refused(sizes, tmp_path):
    torch.save(clip_weights(**{**POCKET, **sizes}), tmp_path / "clip.pt")
    with pytest.raises(InputError, match="clip.pt"):
        load_clip(str(tmp_path / "clip.pt"), (32, 32), 16)


def test_positions_fit_the_image_and_the_other_weights_stay(weights, tmp_path):
    torch.save(weights, tmp_path / "clip.pt")
    clip = load_clip(str(tmp_path / "clip.pt"), (96, 48), 8)
    found = clip.state_dict()
    grid = (96 - 16) // 8 + 1, (48 - 16) // 8 + 1
    assert found["visual.positional_embedding"].shape == (1 + grid[0] * grid[1], 64)
    rest = {key: value for key, value in weights.items() if key != "visual.positional_embedding"}
    same({key: found[key] for key in rest}, rest)


def test_positions_are_interpolated_bilinearly_between_pixel_centres():
    """2 x 2 to 4 x 2, worked by hand: rows at 1/4 and 3/4 of a step are mixed, the outermost ones repeat."""
    positions = torch.tensor([[9.0], [0.0], [1.0], [10.0], [11.0]])
    expected = [9, 0, 1, 2.5, 3.5, 7.5, 8.5, 10, 11]
    assert resize_positions(positions, (4, 2)).flatten().tolist() == pytest.approx(expected)
    with pytest.raises(InputError, match="3 image positions are neither a square grid nor the 4 x 2 of"):
        resize_positions(positions[:4], (4, 2))


def test_positions_of_another_grid_than_a_square():
    """A training's own positions: as they are at its image size; from their own grid at another."""
    positions = torch.arange(9.0)[:, None]
    assert resize_positions(positions, (4, 2)) is positions  # 8 are no square: those of this image size
    four = torch.tensor([[9.0], [0.0], [1.0], [2.0], [3.0]])
    assert resize_positions(four, (4, 1), stored=(4, 1)) is four
    assert resize_positions(four, (2, 1), stored=(4, 1)).flatten().tolist() == [9, 0.5, 2.5]
    # a header that cannot be true counts nothing
    assert resize_positions(four, (2, 2), stored=(7, 7)) is four


def test_a_files_header_says_of_which_grid_its_positions_are(weights, tmp_path):
    """16 positions of 8 x 2 are not of 4 x 4: garbled without a word where the header is not asked."""
    from safetensors.torch import save_file

    key, path = "visual.positional_embedding", tmp_path / "clip.safetensors"
    tall = {**weights, key: torch.randn(17, 64)}
    save_file(tall, path, metadata={"image_positions": "8x2"})
    assert torch.equal(load_clip(str(path), (128, 32), 16).state_dict()[key], tall[key])
    for header in ({}, {"image_positions": "8"}, {"image_positions": "9x2"}):
        save_file(tall, path, metadata=header)
        assert torch.equal(load_clip(str(path), (64, 64), 16).state_dict()[key], tall[key])


# ---- what --pretrain_choice names ----


def test_names_addresses_and_checksums_are_those_of_open_clips_table():
    names = {"ViT-B/32": "ViT-B-32", "ViT-B/16": "ViT-B-16", "ViT-L/14": "ViT-L-14"}
    names |= {name: name for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")}
    theirs = {ours: open_clip.get_pretrained_url(name, "openai") for ours, name in names.items()}
    assert CHECKPOINTS == theirs


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(InputError, match="ViT-B/17 is neither a file nor one of RN50, .*ViT-L/14, random"):
        build_model(tiny_args(pretrain_choice="ViT-B/17"), 5)


# ---- the download ----


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` at any address, or breaks off after `sent` bytes of it."""

    content, sent, asked, chunked = b"weights " * 100, None, 0, False

    def do_GET(self):
        type(self).asked += 1
        self.send_response(200)
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(self.content) + self.content[: self.sent])
        else:
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(self.content[: self.sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def handler(monkeypatch):
    """A server on this machine in OpenAI's place; ViT-B/16's address there holds the content's checksum."""
    handler = type("Handler", (Server,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    digest = hashlib.sha256(handler.content).hexdigest()
    address = f"http://127.0.0.1:{server.server_port}/clip/{digest}/ViT-B-16.pt"
    monkeypatch.setitem(CHECKPOINTS, "ViT-B/16", address)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_kept_and_not_fetched_again(handler, tmp_path):
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        assert download("ViT-B/16", cache) == cache / "ViT-B-16.pt"
    assert handler.asked == 1
    assert [path.name for path in cache.iterdir()] == ["ViT-B-16.pt"]
    assert (cache / "ViT-B-16.pt").read_bytes() == handler.content


def test_the_cache_is_clips_own(handler, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert download("ViT-B/16") == tmp_path / ".cache" / "clip" / "ViT-B-16.pt"


def refused(cache):
    """What a failed download says; it names the file to place, and nothing is left in the cache."""
    with pytest.raises(InputError) as error:
        download("ViT-B/16", cache)
    assert f"put it at {cache / 'ViT-B-16.pt'}" in str(error.value)
    assert CHECKPOINTS["ViT-B/16"] in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())
    return str(error.value)


def test_a_download_with_another_checksum_is_refused(handler, tmp_path):
    handler.content = b"something else"
    assert "SHA-256 differs" in refused(tmp_path)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_that_breaks_off_leaves_nothing(chunked, handler, tmp_path):
    handler.sent, handler.chunked = 100, chunked
    refused(tmp_path)
    handler.sent, handler.chunked = None, False
    assert download("ViT-B/16", tmp_path).is_file()  # and the next try is not hindered


def test_an_interrupted_download_leaves_nothing(handler, tmp_path, monkeypatch):
    def interrupt(bar, n=1):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download("ViT-B/16", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_file_to_place_is_named(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError(OSError(101, "Network is unreachable"))

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert "Network is unreachable" in refused(tmp_path / "cache")


def test_a_server_that_does_not_answer_is_reported(tmp_path, monkeypatch, closed_port):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(CHECKPOINTS, "ViT-B/16", f"http://127.0.0.1:{closed_port}/{'0' * 64}/ViT-B-16.pt")
    assert "cannot download ViT-B/16" in refused(tmp_path)


def test_a_cached_file_that_is_not_openais_is_named_and_kept(handler, tmp_path):
    (tmp_path / "ViT-B-16.pt").write_bytes(b"half of it")
    with pytest.raises(InputError, match=r"ViT-B-16.pt is not OpenAI's ViT-B/16 .*delete it"):
        download("ViT-B/16", tmp_path)
    assert (tmp_path / "ViT-B-16.pt").read_bytes() == b"half of it"
    assert handler.asked == 0


def test_a_cache_that_cannot_be_written_is_reported(handler, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="put it at"):
        download("ViT-B/16", tmp_path / "file" / "cache")


# ---- random weights ----


def test_random_weights_take_the_sizes_given():
    clip = load_clip("random", (64, 32), 16, dict(vision_width=64, vision_layers=2, embed_dim=128))
    weights = clip.state_dict()
    assert weights["visual.proj"].shape == (64, 128)
    assert weights["visual.positional_embedding"].shape == (1 + 4 * 2, 64)
    assert weights["text_projection"].shape == (512, 128)
    assert sum(key.endswith("ln_1.weight") for key in weights if key.startswith("visual.")) == 2
