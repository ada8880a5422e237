"""What goes wrong with a GPU, and about which: one sentence each. CUDA's part is played, since most machines
that run this have none."""

import atexit
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from retrieval.encoders import Encoders
from tests.conftest import PATIENCE
from utils import device, errors
from utils.device import out_of_memory, pick_device
from utils.errors import InputError, reports_errors
from utils.process_group import process_group

GPU = torch.device("cuda:1")
GIB = 2**30
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def asked_anew():
    """What has been found out of this machine is found out again."""
    device.gpus.cache_clear()
    errors.say_once.cache_clear()
    yield
    device.gpus.cache_clear()
    errors.say_once.cache_clear()


@pytest.fixture
def cuda(monkeypatch):
    """A machine with two GPUs; gives what it was told to make current."""
    current = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def launch(monkeypatch, processes, number):
    for name, value in (("RANK", number), ("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", str(number))


@pytest.mark.parametrize(
    ("name", "device", "made_current"),
    [("auto", "cuda", 0), ("cuda", "cuda", 0), ("cuda:0", "cuda:0", 0), ("cuda:1", "cuda:1", 1)],
)
def test_the_gpu_that_is_named_is_the_current_one(name, device, made_current, cuda):
    """Page-locked memory and NCCL's objects name none: they would take memory of GPU 0."""
    assert pick_device(name) == torch.device(device)
    assert cuda == [made_current]


def test_under_torchrun_each_process_has_the_gpu_of_its_number(cuda, monkeypatch):
    launch(monkeypatch, 2, 1)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert set(cuda) == {1}
    launch(monkeypatch, 4, 2)
    with pytest.raises(InputError, match="GPU 2 .*there are 2.*4 processes here .*--nproc_per_node"):
        pick_device("cuda")


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    launch(monkeypatch, 2, 1)
    with pytest.raises(InputError, match="cuda:1 is one GPU for the 2 processes here: with --device cuda"):
        pick_device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("number", ["2", "256", "300", "99999999999"])
def test_a_gpu_that_there_is_not_is_refused(number, cuda):
    """PyTorch takes cuda:256 for cuda:0."""
    with pytest.raises(InputError, match=f"cuda:{number}: GPU {number} is asked for, but there are 2"):
        pick_device(f"cuda:{number}")
    assert not cuda


def test_a_gpu_that_cannot_be_used_is_a_sentence(cuda, monkeypatch):
    def refuse(index):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel …")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(InputError, match="GPU 1 cannot be used .CUDA error: .* unavailable.: nvidia-smi"):
        pick_device("cuda:1")


OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update "
    "your GPU driver"
)


@pytest.fixture
def old_driver(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def is_available():
        warnings.warn(OLD, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)


def test_without_a_gpu_the_sentence_says_why(old_driver, monkeypatch):
    with pytest.raises(InputError, match=r"sees no CUDA device here \(The NVIDIA driver .* too old .*11040"):
        pick_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES hides them all"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(InputError, match="one for CPUs only.*use --device cpu"):
        pick_device("cuda")


def test_a_driver_that_is_too_old_is_told_once_where_the_cpu_steps_in(old_driver, capsys):
    """Else a training goes on a hundred times slower, and nothing says why."""
    for _ in range(3):
        assert pick_device("auto") == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the CPU is used, since no GPU can be: The NVIDIA driver")


@pytest.mark.parametrize(
    ("built_for", "visible", "there", "said"),
    [
        (None, "0", ("/dev/nvidia0",), "one for CPUs only"),
        (None, "0", ("/dev/kfd",), "one for CPUs only"),
        (None, "0", (), ""),
        (None, "", ("/dev/nvidia0",), ""),  # the CPU is meant
        ("13.0", "7", ("/dev/nvidia0",), "PyTorch finds none, with CUDA_VISIBLE_DEVICES 7"),
    ],
)
def test_the_cpu_does_not_step_in_for_a_gpu_in_silence(built_for, visible, there, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(os.path, "exists", lambda file: file in there)
    assert pick_device("auto") == torch.device("cpu")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(said in line for line in lines)


def test_where_the_cpu_is_meant_nothing_is_said(old_driver, capsys):
    assert pick_device("cpu") == torch.device("cpu")
    assert capsys.readouterr().err == ""


# ---- memory, and GPUs that fail ----


def memory(monkeypatch, free, peak, reserved):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * GIB)


def said(error, *where):
    with pytest.raises(InputError) as raised, out_of_memory(GPU, *where):
        raise error
    return str(raised.value)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nsecond line")


def test_out_of_memory_says_whose_the_memory_is(monkeypatch):
    memory(monkeypatch, free=0.5, peak=22, reserved=23)
    alone = said(FULL, 64)
    assert "at --batch_size 64 (peak 22.0 of 24.0 GiB): lower --batch_size" in alone
    assert "--micro_batch" in alone and "--test_batch_size" in alone
    memory(monkeypatch, free=0.5, peak=4, reserved=5)
    assert "(peak 4.0 of 24.0 GiB; other programs use 18.0, see nvidia-smi)" in said(FULL, 64)


def test_each_program_names_its_own_option(monkeypatch):
    memory(monkeypatch, free=0.5, peak=22, reserved=23)
    for option in ("--test_batch_size", "--encode_batch"):
        assert said(FULL, 512, option).endswith(f"at {option} 512 (peak 22.0 of 24.0 GiB): lower {option}")
    assert said(FULL).endswith("free some, or use --device cpu")


def test_memory_that_cannot_be_asked_for_is_no_second_error(monkeypatch):
    def refuse(device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert "out of memory on cuda:1 at --batch_size 8; nvidia-smi" in said(FULL, 8)


FULL_SHM = "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm)"
FULL_TABLE = "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"
COMPLAINTS = {  # what is raised where something is lacking, and what the user is told
    FULL: "out of memory on cuda:1 at --batch_size 64",
    MemoryError(): "out of memory on cuda:1 at --batch_size 64",
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory": "out of memory on",
    "CUDA error: out of memory\nCUDA kernel errors might be": "out of memory on cuda:1 at",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "out of memory on",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": "out of memory on",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": "out of memory on",
    "CUDA error: no kernel image is available for execution on the device": "has no code for this GPU",
    "CUDA error: all CUDA-capable devices are busy or unavailable": "the GPU is taken",
    "CUDA error: uncorrectable ECC error encountered": "the GPU has failed",
    "CUDA error: unspecified launch failure": "--resume",
    FULL_SHM: "--shm-size",
    FULL_TABLE: "ulimit -n",
    "Caught RuntimeError in pin memory thread for device 0.\nreceived 0 items of ancdata": "ulimit -n",
    "Too many open files. Communication with the workers is no longer possible.": "ulimit -n",
    "DataLoader worker (pid 12) is killed by signal: Bus error.": "--num_workers",
    "DataLoader worker (pid(s) 12, 13) exited unexpectedly": "--num_workers",
}


@pytest.mark.parametrize(("complaint", "sentence"), COMPLAINTS.items(), ids=map(repr, COMPLAINTS))
def test_what_is_lacking_is_a_sentence(complaint, sentence, monkeypatch, capsys):
    memory(monkeypatch, free=0.5, peak=22, reserved=23)

    @reports_errors
    def main(argv):
        with out_of_memory(GPU, 64):
            raise RuntimeError(complaint) if isinstance(complaint, str) else complaint

    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line
    if "out of memory" in sentence:
        assert ": lower --batch_size" in line and "--test_batch_size" in line


def test_a_real_lack_of_memory_is_a_sentence():
    with pytest.raises(InputError, match="out of memory on cpu at --batch_size 8: lower --batch_size"):
        with out_of_memory(torch.device("cpu"), 8):
            torch.empty(1 << 60)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), RuntimeError("shapes"), InputError("x")],
)
def test_another_error_stays_what_it_is(error):
    with pytest.raises(type(error), match=str(error)), out_of_memory(GPU, 64):
        raise error


class Full(torch.nn.Module):
    """A model for which no memory is left."""

    width = 4

    def encode_image(self, images):
        raise FULL

    encode_text = encode_image


def test_search_and_the_page_say_it_too():
    encoders = Encoders(Full(), (8, 8), 77, torch.device("cpu"), "none")
    with pytest.raises(InputError, match="out of memory on cpu at --encode_batch 2: lower --encode_batch"):
        encoders.image_features([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2)
    with pytest.raises(InputError, match="out of memory on cpu: free some"):
        encoders.text_features(["a man"])


# ---- NCCL, with gloo in its place ----


@pytest.fixture
def nccl(monkeypatch):
    """torchrun's only process; gives the statuses with which it is to end without taking leave."""
    launch(monkeypatch, 1, 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    begin, statuses = torch.distributed.init_process_group, []
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **how: begin({"nccl": "gloo"}[backend], **how),
    )
    monkeypatch.setattr(atexit, "register", lambda function, status: statuses.append(status))
    yield statuses
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


REMOTE = "NCCL error in: x.hpp:328, remote process exited\nncclRemoteError: A call failed possibly …"
NCCL_SHM = "NCCL error in: x.hpp:328\nncclSystemError: System call failed.\nLast error:\nno space in /dev/shm"


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (InputError("no room"), "no room", 2),
        (RuntimeError(REMOTE), "one of the 1 processes has ended", 2),
        (RuntimeError(NCCL_SHM), "NCCL, by which .* failed: no space in /dev/shm .NCCL_DEBUG=INFO", 2),
        (ValueError("a fault"), "a fault", 1),
    ],
    ids=["input", "remote", "here", "fault"],
)
def test_a_process_that_fails_does_not_take_leave_of_the_others(error, sentence, status, nccl):
    """They may wait in an exchange for ever, and NCCL's end of a group waits for all of its processes."""
    with pytest.raises(type(error) if status == 1 else InputError, match=sentence):
        with process_group(GPU):
            raise error
    assert nccl == [status] and torch.distributed.is_initialized()


def test_one_that_ends_well_does(nccl):
    with process_group(GPU):
        assert torch.distributed.is_initialized()
    assert not nccl and not torch.distributed.is_initialized()


WAITS_FOR_EVER = """
import atexit, os, time
import torch.distributed
from utils.errors import InputError, reports_errors
from utils.process_group import process_group

os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
begin = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, **how: begin("gloo", **how)
torch.distributed.destroy_process_group = lambda: time.sleep(900)
atexit.register(time.sleep, 900)

@reports_errors
def main(argv):
    with process_group(torch.device("cuda:0")):
        raise InputError("no room")

raise SystemExit(main([]))
"""


def test_its_sentence_is_said_and_it_ends_though_nccl_would_wait():
    done = subprocess.run(
        [sys.executable, "-c", WAITS_FOR_EVER], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: no room"
