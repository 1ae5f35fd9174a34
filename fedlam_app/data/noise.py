"""Estimation noise on clean channels, drawn when a batch is made, so that every epoch sees new noise.

LLM4CP draws its noise once at load time and puts it on the labels too; here labels stay clean and the
noise is a function of the generator alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def add_noise(
    clean: npt.NDArray[np.complex64], snr_db: npt.ArrayLike, rng: np.random.Generator
) -> npt.NDArray[np.complex64]:
    """Return ``clean`` plus CN(0, 10^(-snr_db/10)) on every entry.

    ``clean`` (U, ...) has unit mean power per user, so ``snr_db`` [dB], a number or (U,), is each user's
    mean SNR; ``inf`` adds nothing. Raises ``ValueError`` where ``snr_db`` is NaN or has another length.
    """
    levels_db = np.asarray(snr_db, dtype=np.float64)
    if levels_db.shape not in ((), clean.shape[:1]) or np.isnan(levels_db).any():
        raise ValueError(
            f"snr_db must be a number or one number for each of {len(clean)} users, "
            f"got shape {levels_db.shape}{' with NaN' if np.isnan(levels_db).any() else ''}"
        )
    # Real and imaginary part carry half of the variance each.
    sigma = np.sqrt(0.5 * 10 ** (-levels_db / 10)).astype(np.float32)
    noise = rng.standard_normal((*clean.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    noise *= sigma.reshape(sigma.shape + (1,) * (clean.ndim - sigma.ndim))
    noise += clean
    return noise
