"""The language model of the quantization bench, trained and written as a Hugging Face folder.

    python bench/quant_lm.py out/lm --twin

It is the one of the tests (tests/quant/language.py), after 800 steps in place of 200; with --twin, that with outliers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.quant.language import language, perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write the model; without, nothing is written")
    parser.add_argument("--twin", action="store_true", help="three channels of each pair of layers 30 times larger")
    parser.add_argument("--steps", type=int, default=800, help="of training")
    asked = parser.parse_args()
    start = time.perf_counter()
    model = language(asked.steps, twin=asked.twin)
    print(f"{asked.steps} steps, {time.perf_counter() - start:.0f} s, perplexity {perplexity(model):.4f}")
    if asked.folder:
        model.save_pretrained(asked.folder)


if __name__ == "__main__":
    main()
