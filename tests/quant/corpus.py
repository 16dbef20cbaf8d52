"""Real text that every machine with Python has: the sources of the standard library, as tokens."""

from __future__ import annotations

import dataclasses
import functools
import platform
import sysconfig
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

VOCABULARY = 1024
# Tests repeat one another, and the tables of the encodings are numbers.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})
# Of each 16 pieces of 4,096 tokens one is only ever evaluated on. Whole files would be of other subjects.
PIECE, HELD_OUT = 4096, 16


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens ``int64 [count]`` that are trained on, and others of the same files, that are not."""

    train: torch.Tensor
    held_out: torch.Tensor

    def calibration(self, count: int = 64, length: int = 128) -> torch.Tensor:
        """``int64 [count, length]``: windows of the text that is trained on."""
        return _spread(self.train, count, length)

    def evaluation(self, count: int = 64, length: int = 256) -> torch.Tensor:
        """``int64 [count, length]``: windows of the text that is not."""
        return _spread(self.held_out, count, length)


@functools.cache
def corpus(cache: Path) -> Corpus:
    """The tokens, made on first use (ten seconds) and kept in the folder ``cache``."""
    file = cache / f"{version()}.npz"
    if not file.exists():
        work = file.with_suffix(".tmp.npz")
        np.savez(work, **_tokens())
        work.rename(file)
    with np.load(file) as stored:
        return Corpus(*(torch.from_numpy(stored[name].astype(np.int64)) for name in ("train", "held_out")))


def version() -> str:
    """What the tokens depend on, as the name of a file."""
    return f"python-{platform.python_version()}-{VOCABULARY}-{PIECE}-{HELD_OUT}"


def _tokens() -> dict[str, np.ndarray]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT.intersection(path.relative_to(root).parts)]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokens = np.concatenate([np.array(encoded.ids, np.uint16) for encoded in tokenizer.encode_batch(texts)])
    pieces = tokens[: len(tokens) // (PIECE * HELD_OUT) * PIECE * HELD_OUT].reshape(-1, HELD_OUT, PIECE)
    return {"train": pieces[:, 1:].flatten(), "held_out": pieces[:, 0].flatten()}


def _spread(tokens: torch.Tensor, count: int, length: int) -> torch.Tensor:
    starts = torch.linspace(0, len(tokens) - length, count, dtype=torch.float64).long()
    return tokens[starts[:, None] + torch.arange(length)]
