"""Random numbers of a row: they depend on its tokens, a seed and the epoch, so batches may be divided in any way."""

import hashlib

import numpy as np


def row_generator(ids: np.ndarray, seed: int, epoch: int, use: int = 0) -> np.random.Generator:
    """A generator for a row of token ids (T,); nothing has to be saved to resume, and two models see the same draws.

    Args:
        seed: another seed gives other numbers.
        epoch: so does another epoch.
        use: what the numbers are for; two uses share none.
    """
    salt = (seed % 2**64).to_bytes(16, "little")
    key = int.from_bytes(hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=16, salt=salt).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, use, epoch]))
