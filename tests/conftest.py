"""What several test files share."""

import importlib.util
import logging
import os
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest

# before PyTorch is loaded: on busy cores, threads that spin while they wait make the tests ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads of each would fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell without job control starts what it puts in the background with SIGINT ignored, nohup with SIGHUP
# ignored; the programs that tests start and then stop would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds: what a test waits for longer hangs; what takes one takes twenty on busy cores
SLOW = {  # what --fast leaves out, by what takes it long: a file, or file::beginning of a test's name
    "several processes": (
        "test_distributed.py",
        "test_methods.py::test_two_processes",
        "test_tbps.py::test_two_processes",
        "test_noise.py::test_processes_divide",
        "test_second_caption.py::test_two_processes",
        "test_nam.py::test_two_processes",
        "test_micro_batch.py::test_a_training_in_parts_by_five_processes",
        "test_options.py::test_of_many_processes",
        "test_extending.py::test_a_new_loss_is_the_same_in_two_processes",
        "test_finite.py::test_an_error_that_nobody_foresaw",
        "test_bad_input.py::test_a_broken_image",  # its loading processes are waited for
    ),
    "trainings that are killed or stopped, and resumed": (
        "test_kills.py",
        "test_resume.py",
        "test_finite.py::test_the_last_checkpoint_stays_good_and_goes_on",
        "test_noise.py::test_a_run_that_divides",
        "test_second_caption.py::test_a_run_goes_on",
        "test_nam.py::test_a_run_goes_on",
        "test_tbps.py::test_a_run_with_views_goes_on",
        "test_noise.py::test_a_division_that_a_resume",
        "test_nam.py::test_a_run_can_begin",
        "test_tbps.py::test_a_division_is_told",
        "test_files.py::test_a_training_without_room",
        "test_files.py::test_a_full_disk",
        "test_files.py::test_a_resumed_run",
        "test_starts.py::test_a_run_goes_on",
        "test_table.py::test_an_interrupted_table",
        "test_table.py::test_the_commands_that_dry_lists_make",
        "test_table.py::test_a_failure_names",
        "test_table.py::test_the_table_has",
        "test_table.py::test_what_is_finished",
        "test_table.py::test_the_results_file",
        "test_table.py::test_a_run_that_was_made",
        "test_table.py::test_the_picture",
        "test_drawn.py::test_an_interrupted_table",
        "test_drawn.py::test_the_average_is",
        "test_drawn.py::test_the_seconds",
        "test_drawn.py::test_runs_with_options",
        "test_drawn.py::test_what_is_written",
        "test_drawn.py::test_of_runs_kept",
        "test_drawn.py::test_a_set_that_was_drawn",
    ),
    "long trainings, and several of them": (
        "test_trajectory.py",
        "test_finite.py::test_a_training_that_diverges",
        "test_finite.py::test_max_grad_norm_reaches",
        "test_bad_input.py::test_odd_images_train",
        "test_methods.py::test_twenty_steps",
        "test_average.py::test_what_is_trained_does_not_depend_on_it",
        "test_average.py::test_it_can_begin_and_end",
        "test_average.py::test_best_ema_is",
        "test_average.py::test_without_it_nothing",
        "test_exactness.py::test_ten_steps",
        "test_table.py::test_each_row_starts",
        "test_drawn.py::test_each_method_starts",
        "test_drawn.py::test_the_small_clip_is_trained",
        "test_fp16.py::test_120_steps",
        "test_fp16.py::test_with_a_fused_optimiser_they_do_not",
        "test_pretended.py::test_live_memory_is_the_same_after_step_3_and_after_step_25",
    ),
    "the model at full size": ("test_model_reference.py::test_full_size",),
    "each combination of losses and each way to train, in each precision": (
        "test_micro_batch.py::test_parts_of_a_batch_give_the_losses_and_gradients_of_two_or_three",
        "test_pretended.py::test_every_combination_of_losses",
        "test_pretended.py::test_every_way_to_train",
        "test_exactness.py::test_each_shortcut_alone",
    ),
    "downloads that are tried again": ("test_hub.py::test_a_download_that_breaks_off",),
    "compilers": (
        "test_exactness.py::test_compiled_encoders",
        "test_methods.py::test_compiled_encoders",
        "test_surroundings.py::test_a_machine_without_a_compiler",
        "test_exactness.py::test_what_torch_compile_generates",
        "test_export.py::test_onnx",
    ),
    "the benchmarks, the dry run of the one for a GPU above all": (
        "test_benchmarks.py",
        "test_words.py::test_each_kind_of_word_has_a_line",
    ),
    "other programs' libraries, loaded by a process each or asked at several image sizes": (
        "test_export.py::test_the_example_of_each_card",
        "test_export.py::test_in_each_form_of_a_run_that_leaves_punctuation_out",
        "test_export.py::test_transformers_gives_the_same_features_at_any_image_size",
    ),
    "programs of their own, and pictures of five million pixels": (
        "test_gallery.py::test_a_program_that_a_signal_ends",
        "test_output.py::test_a_training_that_nobody_listens_to",
        "test_output.py::test_pictures_of_any_caption",
        "test_pictures.py::test_a_pictures_shape_does_not_decide_the_memory",
    ),
    "a browser, and a server to look at": ("test_demo_page.py",),
}


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="no slow tests (conftest.py lists them)")


def pytest_configure(config):
    if config.option.fast and config.option.durations is None:
        config.option.durations = 5  # a new slow test is seen here
    config.option.loadscopereorder = False  # xdist's: by the number of a file's tests


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    rows = tuple(row for rows in SLOW.values() for row in rows)
    slow = [item for item in items if f"{item.path.name}::{item.name}".startswith(rows)]
    if hasattr(config, "workerinput"):  # several processes: what lasts begins first, for all to end together
        lasting = Counter(item.path for item in slow)
        items.sort(key=lambda item: -lasting[item.path])
    for item in slow:
        item.add_marker("slow")
    if config.option.fast:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def load_script(name):
    """train.py or test.py as a module; `import test` would find Python's own package of that name."""
    spec = importlib.util.spec_from_file_location(f"irra_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def train_script():
    return load_script("train")


@pytest.fixture(scope="session")
def test_script():
    return load_script("test")


@pytest.fixture
def closed_port():
    """A port at which nobody answers, and which no program gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(autouse=True)
def clean_logger():
    """A run points the logger at its folder; the next test starts without that."""
    yield
    logger = logging.getLogger("IRRA")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
