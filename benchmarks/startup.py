"""How long `python train.py --help` and the answer to a mistyped option take.

python -m benchmarks.startup

The published arm is what its train.py does before it looks at its options: it imports torch and torchvision.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import interleaved, new_parser, record

ROOT = Path(__file__).parent.parent
ARMS = {
    "published": ["-c", "import torch, torchvision"],
    "--help": ["train.py", "--help"],
    "a mistyped option": ["train.py", "--batchsize", "64"],
}


def main(argv=None):
    args = new_parser(__doc__, ["repeats"]).parse_args(argv)

    def start(words):
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)

    seconds, _ = interleaved({name: partial(start, words) for name, words in ARMS.items()}, args.repeats)
    record("start-up", seconds, "s")


if __name__ == "__main__":
    main()
