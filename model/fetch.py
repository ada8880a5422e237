"""Where weights come from: a file or folder, a name of OpenAI's CLIP, a repository of Hugging Face's hub."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from model.weights_config import check_config
from model.weights_file import shards
from utils.errors import InputError, first_line
from utils.files import whole_file
from utils.progress import progress_bar

# OpenAI's archives, https://github.com/openai/CLIP; the folder in the address is the file's SHA-256
_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
CHECKPOINTS = {
    "RN50": f"{_ADDRESS}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": f"{_ADDRESS}/8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": f"{_ADDRESS}/7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": f"{_ADDRESS}/52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": f"{_ADDRESS}/be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": f"{_ADDRESS}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": f"{_ADDRESS}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": f"{_ADDRESS}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}
HUB = "hf-hub:"
IN_HUB = (  # files of a repository or a folder, best first, and the one that says how its weights compute
    ("open_clip_model.safetensors", "open_clip_config.json"),
    ("open_clip_pytorch_model.bin", "open_clip_config.json"),
    ("model.safetensors", "config.json"),
    ("model.safetensors.index.json", "config.json"),
    ("pytorch_model.bin", "config.json"),
    ("pytorch_model.bin.index.json", "config.json"),
)
OF_RUNS = ("best.pth", "best0.pth", "best1.pth", "best2.pth", "last.pth")
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".json", ".tar", ".zip", ".ckpt", ".npz")


def locate(choice):
    """Path of the file that --pretrain_choice names; fetched first, where it is a name."""
    choice = str(choice)
    if name := openai_name(choice):
        return download(name)
    path = Path(choice)
    if not choice.startswith(HUB) and path.exists():
        return in_folder(path) if path.is_dir() else path
    if choice.startswith(HUB) or is_hub_name(choice):
        return from_hub(choice.removeprefix(HUB))
    raise InputError(
        f"--pretrain_choice {choice} is neither a file nor one of {', '.join(CHECKPOINTS)}, random; a "
        f"repository of the Hugging Face hub is written {HUB}ORGANISATION/NAME"
    )


def openai_name(choice):
    """OpenAI's name of a model, from it or from open_clip's spelling (ViT-B-16); None for other words."""
    if choice in CHECKPOINTS:
        return choice
    return next((name for name, address in CHECKPOINTS.items() if Path(address).stem == choice), None)


def in_folder(folder):
    """The one file of weights in a folder: of open_clip, of transformers, of a run."""
    known = [name for name, _ in IN_HUB if (folder / name).is_file()]
    runs = [name for name in OF_RUNS if (folder / name).is_file()]
    if known or runs[:1] == ["best.pth"] or len(runs) == 1:
        return folder / [*known, *runs][0]
    if runs:
        raise InputError(f"--pretrain_choice {folder} holds {', '.join(runs)}: name the one that is meant")
    there = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES and path.suffix != ".json")
    if len(there) == 1:
        return there[0]
    found = f"it holds {', '.join(path.name for path in there[:5])}" if there else "it holds none"
    raise InputError(f"--pretrain_choice {folder} is a folder: name the file of weights in it ({found})")


# ---- OpenAI's archives ----


def download(name, cache=None):
    """Path of an OpenAI archive in the cache (~/.cache/clip), downloaded once and checked by SHA-256."""
    address = CHECKPOINTS[name]
    digest, filename = address.split("/")[-2:]
    try:
        target = Path(cache or Path.home() / ".cache" / "clip") / filename
    except RuntimeError:
        raise InputError(
            f"{name} would be kept in ~/.cache/clip, but this user has no home folder: set HOME, or fetch "
            f"{address} and give --pretrain_choice its path"
        ) from None
    by_hand = f"fetch {address} on another machine and put it at {target}, or give --pretrain_choice its path"
    if target.is_file():
        if sha256(target) == digest:
            return target
        raise InputError(
            f"{target} is not OpenAI's {name} (its SHA-256 differs): delete it to download it anew"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {target.parent} ({error.strerror}): {by_hand}") from None
    with whole_file(target) as file:
        try:
            with urllib.request.urlopen(address, timeout=30) as source:
                total = int(source.headers.get("Content-Length") or 0) or None
                with progress_bar(total, f"CLIP {name}", unit="B", unit_scale=True) as bar:
                    while block := source.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"cannot download {name} ({reason}): {by_hand}") from None
        file.flush()
        if sha256(file.name) != digest:
            raise InputError(
                f"the download of {name} came out damaged (its SHA-256 differs): try again, or {by_hand}"
            )
    return target


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- the Hugging Face hub ----


def is_hub_name(choice):
    """Whether a word that is no file may be ORGANISATION/NAME of the hub, and no mistyped path or model."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", choice) or re.match(r"(?i)vit-|rn\d", choice):
        return False
    return Path(choice).suffix.lower() not in SUFFIXES and not Path(choice).parent.is_dir()


def from_hub(repository):
    """Path of a repository's weights in the hub's cache, with what says how they compute beside it.

    Only these files are fetched, once; the small one first, so that another model costs no large download.
    """
    kept = ((_cached(repository, file), config) for file, config in IN_HUB)
    path, config = next((pair for pair in kept if pair[0]), None) or _first_there(repository)
    if path.suffix == ".json":
        for shard in shards(path):
            _cached(repository, shard) or _fetched(repository, shard)
    if not (path.parent / config).exists():  # whoever cached the weights has left it out
        _fetched(repository, config)
    return path


def _cached(repository, file):
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, file)
    except HFValidationError:
        raise InputError(f"{HUB}{repository}: a repository is named ORGANISATION/NAME") from None
    return Path(path) if isinstance(path, str) else None  # else absent, or known not to be there


def _first_there(repository):
    """The best of IN_HUB that a repository has, fetched once its config is seen to be of CLIP's kind."""
    for config in dict.fromkeys(config for _, config in IN_HUB):
        if said := _fetched(repository, config):
            check_config(said, f"{HUB}{repository}")
            for file in [file for file, beside in IN_HUB if beside == config]:
                if path := _fetched(repository, file):
                    return path, config
    raise InputError(
        f"{HUB}{repository} holds none of {', '.join(file for file, _ in IN_HUB)} with its config: fetch its "
        "file of weights and give --pretrain_choice the path"
    )


def _fetched(repository, file):
    """Path of a file of a repository, fetched with a bar; None where it is not there."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file))  # fails at once where the download would wait
        except EntryNotFoundError:
            return None
        return Path(hf_hub_download(repository, file))
    except GatedRepoError:
        reason = "its authors want to be asked, see its page, then `hf auth login`"
    except RepositoryNotFoundError:
        raise InputError(
            f"{HUB}{repository}: the hub has no such repository, or it is private (`hf auth login`); nor is "
            "there a file or folder of this name"
        ) from None
    except Exception as error:  # whatever the client trips over on the way
        reason = first_line(error.__cause__ or error)
    address = f"{constants.ENDPOINT}/{repository}/resolve/main"
    raise InputError(
        f"cannot fetch {file} of {repository} from the hub ({reason}): on another machine, fetch its weights "
        f"({address}/{IN_HUB[0][0]} or model.safetensors) and their config ({IN_HUB[0][1]} or config.json), "
        "and give --pretrain_choice their folder"
    ) from None
