"""Read channels made elsewhere: QuaDRiGa sets as ``.npz``, and LLM4CP's folders of MATLAB v7.3 files.

Both hold 16 slots of history and 4 of future, 0.5 ms apart, of users with one antenna in front of a
panel; the numbers of users, subcarriers and base-station antennas are free. Files are known by the
keys inside them, never by their names. Every fault of a file raises ``ValueError`` in one sentence
that names the path, what was found and what is expected.

LLM4CP's arrays (arXiv 2406.14440 and issue 6 of its repository) are ``[v, n, L, k, a, b, c]`` in MATLAB:
speed, user, slot, subcarrier, column, row, polarisation (not re/im: entries are complex). HDF5 shows
the axes reversed, and MATLAB drops trailing axes of length one.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlam_app.data.channel_set import ChannelSet

HISTORY_SLOTS = 16
FUTURE_SLOTS = 4

FUTURE_KEY = {"tdd": "H_U_pre", "fdd": "H_D_pre"}
"""The future that a duplex mode predicts from the uplink history ``H_U_his``."""

MAT_AXES = ("v", "n", "L", "k", "a", "b", "c")
MAT_KEY = re.compile(r"(H_U_his|H_U_pre|H_D_pre)_(train|test)")


def read(
    path: Path,
    duplex: str = "tdd",
    split: str = "",
    speeds_kmh: Sequence[float] | None = None,
    scenario: str = "file",
) -> ChannelSet:
    """Return the channels at ``path``: an ``.npz`` file, or a folder of LLM4CP's ``.mat`` files.

    ``split`` and ``speeds_kmh`` concern folders (see :func:`read_mat`); ``scenario`` is the label given to
    the users, which no file carries. Raises ``ValueError`` for anything else at ``path``.
    """
    if path.is_dir():
        return read_mat(path, duplex, split, speeds_kmh, scenario)
    if not path.exists():
        raise ValueError(
            f"there is no file or folder {path}; expected an .npz file or a folder of .mat files"
        )
    if path.suffix.lower() != ".npz":
        raise ValueError(
            f"cannot read {path}; expected an .npz file, or the folder that holds LLM4CP's .mat files"
        )
    if duplex != "tdd":
        raise ValueError(
            f"{path} holds one band, so data.duplex must be 'tdd' with an .npz file, got '{duplex}'"
        )
    return read_npz(path, scenario)


def read_npz(path: Path, scenario: str = "file") -> ChannelSet:
    """Return the channels of a QuaDRiGa ``.npz``.

    Keys: ``H`` (U, 16 + 4 slots, K, A, 2 = re and im) real floats of any width, antennas in the order of
    :class:`ChannelSet`; ``gain_db`` (U,) [dB], the gain already divided out; ``speed_kmh`` (U,).
    """
    content = _npz_arrays(path)
    packed, gain_db, speed_kmh = content["H"], content["gain_db"], content["speed_kmh"]
    slots = HISTORY_SLOTS + FUTURE_SLOTS
    if packed.ndim != 5 or packed.dtype.kind != "f" or packed.shape[1] != slots or packed.shape[4] != 2:
        raise ValueError(
            f"{path}: H is {packed.dtype} of shape {packed.shape}; "
            f"expected floats of shape (users, {slots} slots, subcarriers, antennas, 2)"
        )
    for name, values in (("gain_db", gain_db), ("speed_kmh", speed_kmh)):
        if (
            values.shape != packed.shape[:1]
            or values.dtype.kind not in "fiu"
            or not np.isfinite(values).all()
        ):
            raise ValueError(
                f"{path}: {name} is {values.dtype} of shape {values.shape}; "
                f"expected one finite number for each of the {len(packed)} users of H"
            )
    channels = np.empty(packed.shape[:4], np.complex64)
    channels.real, channels.imag = packed[..., 0], packed[..., 1]
    channels = channels.transpose(0, 3, 1, 2)  # (U, A, T, K)
    scaled = _scaled(
        path, channels[:, :, :HISTORY_SLOTS], channels[:, :, HISTORY_SLOTS:], speed_kmh, scenario
    )
    # The file's own rounding leaves a little to scale; the gain counts both.
    return replace(scaled, gain_db=(scaled.gain_db + gain_db).astype(np.float32))


def read_mat(
    folder: Path,
    duplex: str = "tdd",
    split: str = "",
    speeds_kmh: Sequence[float] | None = None,
    scenario: str = "file",
) -> ChannelSet:
    """Return the channels of the ``.mat`` files in a folder, users ordered by speed, then number.

    ``split`` chooses the keys ``..._train`` or ``..._test``; empty means the only one there. The files do not
    say their speeds, so unless ``speeds_kmh`` gives them [km/h], 10 speeds are 10, 20 .. 100 and 900 are
    10.1, 10.2 .. 100 (LLM4CP's test and training sets), and any other number is spread evenly over 10 .. 100.
    """
    if duplex not in FUTURE_KEY:
        raise ValueError(f"data.duplex must be 'tdd' or 'fdd', got '{duplex}'")
    found = _mat_keys(folder)
    chosen = split or _only_split(folder, found)
    parts: dict[str, npt.NDArray[np.complex64]] = {}
    for name, slots in (("H_U_his", HISTORY_SLOTS), (FUTURE_KEY[duplex], FUTURE_SLOTS)):
        key = f"{name}_{chosen}"
        if key not in found:
            raise ValueError(
                f"{folder}: no .mat file holds {key}; found {', '.join(sorted(found)) or 'none'}"
            )
        parts[key] = _mat_array(found[key], key, slots)
    (his_key, history), (pre_key, future) = parts.items()
    if history.shape[:5] != future.shape[:5] or history.shape[6] != future.shape[6]:
        raise ValueError(
            f"{folder}: {his_key} and {pre_key} must agree in speeds, users, antennas and subcarriers, "
            f"got {_mat_shape(history)} and {_mat_shape(future)}"
        )
    v, n = history.shape[:2]
    speeds = _speeds_kmh(v, speeds_kmh)
    users = (v * n, -1)
    return _scaled(
        folder,
        history.reshape(*users, *history.shape[5:]),
        future.reshape(*users, *future.shape[5:]),
        np.repeat(speeds, n),
        scenario,
    )


def splits_in(folder: Path) -> set[str]:
    """Return which of ``train`` and ``test`` the ``.mat`` files of a folder hold."""
    return {key.rsplit("_", 1)[1] for key in _mat_keys(folder)}


def _scaled(
    path: Path,
    history: npt.NDArray[np.complex64],
    future: npt.NDArray[np.complex64],
    speed_kmh: npt.NDArray[Any],
    scenario: str,
) -> ChannelSet:
    """Return the scaled set; what is wrong with the values is told with the path."""
    if 0 in history.shape:
        raise ValueError(f"{path} holds no channels (shape {history.shape}); expected at least one user")
    try:
        return ChannelSet.from_raw(history, future, speed_kmh, scenario)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _npz_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the three arrays of an ``.npz`` file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected an .npz file of channels")
    names = ("H", "gain_db", "speed_kmh")
    try:
        # Opened as what it must be: np.load would take a stray .npy file or a pickle too.
        with path.open("rb") as file, np.lib.npyio.NpzFile(file) as archive:
            found = list(archive)
            arrays = {name: archive[name] for name in names if name in found}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole .npz file of numbers ({error}); copy or make it again"
        ) from None
    if len(arrays) < len(names):
        raise ValueError(f"{path} must hold the keys {', '.join(names)}, found {', '.join(found) or 'none'}")
    return arrays


def _mat_keys(folder: Path) -> dict[str, Path]:
    """Return which file holds each of LLM4CP's keys."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected a folder of LLM4CP's .mat files")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.mat")):
        with _hdf5(path) as file:
            keys = [key for key, item in file.items() if MAT_KEY.fullmatch(key) and hasattr(item, "dtype")]
        for key in keys:
            if key in found:
                raise ValueError(
                    f"{folder}: both {found[key].name} and {path.name} hold {key}; expected one of them"
                )
            found[key] = path
    return found


def _only_split(folder: Path, found: dict[str, Path]) -> str:
    """Return the one split that the keys belong to."""
    splits = sorted({key.rsplit("_", 1)[1] for key in found})
    if not splits:
        raise ValueError(
            f"{folder}: no .mat file holds a key such as H_U_his_train; found none of LLM4CP's keys"
        )
    if len(splits) > 1:
        raise ValueError(f"{folder} holds both {splits[1]} and {splits[0]} keys; say which split to read")
    return splits[0]


def _mat_array(path: Path, key: str, slots: int) -> npt.NDArray[np.complex64]:
    """Return a key's channels as (v, n, c, a, b, L, k) complex64, slab by slab to spare memory."""
    with _hdf5(path) as file:
        stored = file[key]
        shape = tuple(reversed(stored.shape))
        shape += (1,) * (len(MAT_AXES) - len(shape))
        expected = f"[{', '.join(MAT_AXES)}] with L = {slots} in MATLAB order"
        if len(shape) != len(MAT_AXES) or shape[2] != slots:
            raise ValueError(f"{path}: {key} has axes {_numbers(shape)}; expected {expected}")
        if stored.dtype.names != ("real", "imag"):
            raise ValueError(f"{path}: {key} holds {stored.dtype}; expected complex values {expected}")
        v, n, _, k, a, b, c = shape
        channels = np.empty((v, n, c, a, b, slots, k), np.complex64)
        # HDF5 has the order (c, b, a, k, L, n, v); a c of one may be left out.
        for polarisation in range(c):
            slab = stored[polarisation] if stored.ndim == len(MAT_AXES) else stored[()]
            slab = slab.reshape(b, a, k, slots, n, v).transpose(5, 4, 1, 0, 3, 2)  # (v, n, a, b, L, k)
            channels.real[:, :, polarisation] = slab["real"]
            channels.imag[:, :, polarisation] = slab["imag"]
    return channels


def _mat_shape(channels: npt.NDArray[np.complex64]) -> str:
    """Return the shape of an array from :func:`_mat_array` as MATLAB would print it."""
    v, n, c, a, b, slots, k = channels.shape
    return _numbers((v, n, slots, k, a, b, c))


def _numbers(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(length) for length in shape) + "]"


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    """Open a MATLAB v7.3 file; a file of another version, or a damaged one, is told apart."""
    import h5py

    with path.open("rb") as file:
        header = file.read(20)
    if header.startswith(b"MATLAB 5.0"):
        raise ValueError(f"{path} is a MATLAB v5 file; expected v7.3: load it and save it again with '-v7.3'")
    try:
        with h5py.File(path, "r") as content:
            yield content
    except OSError as error:
        raise ValueError(
            f"{path} is not a whole MATLAB v7.3 (HDF5) file, it may be truncated ({error}); copy it again"
        ) from None


def _speeds_kmh(count: int, given: Sequence[float] | None) -> npt.NDArray[np.float64]:
    """Return the speed [km/h] of each entry of the axis v."""
    if given is None:
        if count == 900:
            return np.linspace(10.1, 100, 900)
        return np.linspace(10, 100, count)
    if len(given) != count:
        raise ValueError(
            f"speeds_kmh must give one speed for each of the {count} speeds in the files, got {len(given)}"
        )
    return np.asarray(given, np.float64)
