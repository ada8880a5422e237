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
    local data=demo/data logs run clip=demo/small_clip.pth
    logs=$(last_value --output_dir demo/logs "$@")
    find_python
    use_environment requirements.txt
    # threads that wait asleep: where cores are shared with other programs, waiting awake takes four times as long
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    # memory that stays with the process: the scores of 49408 words are made anew each step, and were otherwise asked
    # of Linux page by page each time
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4000000000}"
    step "1/4 Drawing pedestrians and writing sentences about them: seconds" "$python" -m datasets.synthetic \
        --format CUHK-PEDES --ids 400 --val_ids 20 --test_ids 100 --images_per_id 4 --root "$data"
    if [ "$clip" -nt configs/small_clip.yaml ]; then
        printf '\n== 2/4 The small CLIP is there from an earlier demo: %s\n' "$clip"
    else
        step "2/4 Drawing 3200 other persons, and training a small CLIP on them: minutes on two CPU cores" small_clip
    fi
    step "3/4 Training IRRA from that CLIP, with the losses sdm+mlm+id: a minute" \
        "$python" train.py --config_file configs/demo.yaml --root_dir "$data" --output_dir "$logs" "$@"
    run=$(newest_run "$logs")
    [ -n "$run" ] || die 1 "The training left no run in $logs (no $logs/*/*/configs.yaml)."
    step "4/4 Looking for persons it has never seen: seconds" \
        "$python" test.py --config_file "$run/configs.yaml" --chance --picture demo/retrieval.png
    cat <<TEXT

The table is above, and in $run/test_log.txt
The picture: demo/retrieval.png
The run:     $run
The time:    $SECONDS s; $took

Next, after $python -m pip install -r requirements-demo.txt: search, look, open a page.
  $python search.py --config_file $run --gallery $data --query "a woman in a red coat" --save demo/search.png
  $python visualize.py --config_file $run --worst 5
  $python demo.py --config_file $run --gallery $data
TEXT
}

small_clip() { # in the place that OpenAI's CLIP has for photographs
    "$python" -m datasets.synthetic --ids 3200 --val_ids 0 --test_ids 100 --images_per_id 1 --root demo/pairs || return
    "$python" train.py --config_file configs/small_clip.yaml --root_dir demo/pairs --output_dir demo/clip || return
    mv "$(newest_run demo/clip)/last.pth" "$clip"
}

newest_run() { # FOLDER: of train.py's --output_dir; nothing where it holds none
    local file newest=""
    for file in "$1"/*/*/configs.yaml; do
        if [ "$file" -nt "$newest" ]; then newest=$file; fi # also newer than none
    done
    [ -z "$newest" ] || dirname -- "$newest"
}

took=""
step() { # TITLE COMMAND...: stops with the command's own exit code
    local begin=$SECONDS code=0 title=$1
    printf '\n== %s\n' "$title"
    shift
    "$@" || code=$?
    [ "$code" -eq 0 ] || die "$code" "
The demo stopped at this step, exit code $code (its own message is above): $*"
    printf '== done in %s s\n' "$((SECONDS - begin))"
    took="$took${took:+, }${title%%:*} $((SECONDS - begin)) s"
}

train() {
    local dataset_name=${DATASET_NAME:-CUHK-PEDES} root_dir=${ROOT_DIR:-./data}
    find_python
    # before anything is installed; a file of one's own, or a name that is not known, is for train.py to judge
    [ -n "$(last_value --annotations "" "$@")" ] || "$python" -m utils.data_sets \
        "$(last_value --dataset_name "$dataset_name" "$@")" "$(last_value --root_dir "$root_dir" "$@")"
    use_environment requirements.txt
    exec "$python" train.py --name irra --img_aug --batch_size 64 --MLM --loss_names sdm+mlm+id \
        --dataset_name "$dataset_name" --root_dir "$root_dir" --num_epoch 60 "$@"
}

# The value of FLAG that train.py will see.
last_value() { # FLAG DEFAULT ARGUMENT...
    local flag=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        "$flag") value=${2:-} ;;
        "$flag"=*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

help_if_asked "$@"
case ${1:-} in
demo) demo "${@:2}" ;;
"" | -*) train "$@" ;;
*) die 2 "There is no '$1': say ./run_irra.sh demo, or give flags for train.py (see ./run_irra.sh --help)." ;;
esac
