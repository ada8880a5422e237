#!/usr/bin/env bash
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source scripts/environment.sh

show_help() {
    cat <<'TEXT'
Usage: ./run_irra.sh [FLAGS FOR train.py]         train with the paper's recipe
       ./run_irra.sh demo [FLAGS FOR train.py]    see it work: needs no data set and no GPU

The recipe (CVPR 2023, arXiv 2303.12501):
  python train.py --name irra --img_aug --batch_size 64 --MLM --loss_names sdm+mlm+id --dataset_name CUHK-PEDES
                  --root_dir ./data --num_epoch 60
Flags that you add come last and win. It needs the data set (README.md says where to get it) and, in practice, a GPU.
The recipe's flags also win over a --config_file; to run one as it stands: python train.py --config_file FILE

The demo draws pedestrians and writes sentences about them, trains a small CLIP on some of them and IRRA from that on
others, tests it on persons it has never seen and paints what it finds. It writes in demo/ only; each further demo adds
a run there, from the same small CLIP.

  ./run_irra.sh demo                                        the place to start
  ./run_irra.sh demo --num_epoch 2                          a shorter one
  ./run_irra.sh                                             CUHK-PEDES in ./data
  DATASET_NAME=RSTPReid ROOT_DIR=/datasets ./run_irra.sh    another data set, elsewhere
  ./run_irra.sh --name no_id --loss_names sdm+mlm           another recipe
  CUDA_VISIBLE_DEVICES=1 ./run_irra.sh                      on the second GPU
  python train.py --help                                    all flags

Environment: DATASET_NAME   CUHK-PEDES (default), ICFG-PEDES or RSTPReid; --dataset_name wins over it
             ROOT_DIR       the folder that contains CUHK-PEDES/ ... (default ./data); --root_dir wins over it
             PYTHON         the Python to use, 3.10 or newer (default: the active one, else python3.13 ... python3.10)
Relative paths start at the repository's folder.

The active Python is used as it is when it has everything in requirements.txt. Otherwise the first run makes .venv here
and installs it there: on Linux about 5.5 GB on disk (PyTorch with CUDA), 5 to 15 minutes. To use that in your shell:
source .venv/bin/activate
TEXT
}

demo() {
    find_python
    use_environment requirements.txt
    exec "$python" -m scripts.demo "$@"
}

train() {
    local data_set=(--dataset_name "${DATASET_NAME:-CUHK-PEDES}" --root_dir "${ROOT_DIR:-./data}")
    find_python
    "$python" -m utils.data_sets "${data_set[@]}" "$@" # is it there? before anything is installed
    use_environment requirements.txt
    exec "$python" train.py --name irra --img_aug --batch_size 64 --MLM --loss_names sdm+mlm+id \
        "${data_set[@]}" --num_epoch 60 "$@"
}

help_if_asked "$@"
case ${1:-} in
demo) demo "${@:2}" ;;
"" | -*) train "$@" ;;
*) die 2 "There is no '$1': say ./run_irra.sh demo, or give flags for train.py (see ./run_irra.sh --help)." ;;
esac
