"""The readers against files written here in each layout, against real files, and against bad ones."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from fedlam_app.data.readers import read, read_mat, read_npz, splits_in

V, N, K, A, B, C = 3, 2, 5, 4, 3, 2
SHARED = Path(os.environ.get("FEDLAM_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="no shared data: set FEDLAM_SHARED_DATA to its folder"
)


def matlab_array(slots: int, seed: int, shape: tuple[int, ...] = (A, B, C)) -> np.ndarray:
    """A complex array [v, n, L, k, a, b, c] as MATLAB holds it."""
    return np.random.default_rng(seed).standard_normal((V, N, slots, K, *shape, 2)) @ [1, 1j] * 1e-5


def write_mat(path: Path, real: str = "<f8", **arrays: np.ndarray) -> None:
    """Write what ``save -v7.3`` writes: a header block, reversed axes, complex as a pair real, imag."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, array in arrays.items():
            stored = np.empty(array.T.shape, [("real", real), ("imag", real)])
            stored["real"], stored["imag"] = array.T.real, array.T.imag
            file[key] = stored
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")


def folder_with(tmp_path: Path, split: str = "train", **changed: np.ndarray) -> Path:
    arrays = {"H_U_his": matlab_array(16, 1), "H_U_pre": matlab_array(4, 2), "H_D_pre": matlab_array(4, 3)}
    for number, (name, array) in enumerate((arrays | changed).items()):
        write_mat(tmp_path / f"{split}{number}.mat", **{f"{name}_{split}": array})
    return tmp_path


# --- LLM4CP's folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("duplex", "seed"), [("tdd", 2), ("fdd", 3)])
@pytest.mark.parametrize("real", ["<f8", "<f4"])
def test_every_entry_of_a_mat_folder_lands_on_its_axes(
    tmp_path: Path, duplex: str, seed: int, real: str
) -> None:
    his, pre = matlab_array(16, 1), matlab_array(4, seed)
    write_mat(tmp_path / "any name.mat", real, H_U_his_train=his, H_U_pre_train=matlab_array(4, 2))
    write_mat(tmp_path / "other.mat", real, H_D_pre_train=matlab_array(4, 3))
    data = read(tmp_path, duplex)
    assert data.history.shape == (V * N, A * B * C, 16, K) and data.future.shape == (V * N, A * B * C, 4, K)
    amplitude = 10 ** (data.gain_db / 20)
    for v, n, a, b, c in np.ndindex(V, N, A, B, C):
        user, antenna = v * N + n, c * A * B + a * B + b
        for found, stored in ((data.history, his), (data.future, pre)):
            np.testing.assert_allclose(
                found[user, antenna] * amplitude[user], stored[v, n, :, :, a, b, c], rtol=1e-4, atol=1e-10
            )


def test_one_polarisation_loses_its_axis_in_matlab(tmp_path: Path) -> None:
    his, pre = matlab_array(16, 1, (A, B)), matlab_array(4, 2, (A, B))
    data = read(folder_with(tmp_path, H_U_his=his, H_U_pre=pre))
    assert data.history.shape == (V * N, A * B, 16, K)
    found = data.future[3, 2 * B + 1] * 10 ** (data.gain_db[3] / 20)
    np.testing.assert_allclose(found, pre[1, 1, :, :, 2, 1], rtol=1e-4, atol=1e-10)


def test_speeds_follow_the_number_of_speeds_or_are_given(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    assert read(folder).speed_kmh.tolist() == [10, 10, 55, 55, 100, 100]
    assert read(folder, speeds_kmh=[3, 30, 90]).speed_kmh.tolist() == [3, 3, 30, 30, 90, 90]
    with pytest.raises(ValueError, match="speeds_kmh must give one speed for each of the 3 speeds"):
        read(folder, speeds_kmh=[3, 30])


@pytest.mark.parametrize(
    ("count", "some", "expected"), [(10, [0, 1, 9], [10, 20, 100]), (900, [0, 1, 899], [10.1, 10.2, 100])]
)
def test_llm4cps_own_speeds(tmp_path: Path, count: int, some: list[int], expected: list[float]) -> None:
    def few(slots: int) -> np.ndarray:
        return np.ones((count, 1, slots, 1, 1, 1, 1), complex)

    write_mat(tmp_path / "x.mat", "<f4", H_U_his_test=few(16), H_U_pre_test=few(4))
    np.testing.assert_allclose(read(tmp_path).speed_kmh[some], expected, rtol=1e-6)


def test_a_folder_with_both_splits_needs_to_be_told_which(tmp_path: Path) -> None:
    folder_with(tmp_path, "train")
    folder_with(tmp_path, "test", H_U_his=matlab_array(16, 9))
    assert splits_in(tmp_path) == {"train", "test"}
    train, test = read(tmp_path, split="train"), read(tmp_path, split="test")
    assert not np.array_equal(train.history, test.history)
    with pytest.raises(ValueError, match="holds both train and test keys; say which split"):
        read(tmp_path)


def test_bad_mat_folders_are_told_in_one_sentence(tmp_path: Path) -> None:
    def refused(message: str, folder: Path, **arguments: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            read_mat(folder, **arguments)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def folder(name: str, **changed: np.ndarray) -> Path:
        (tmp_path / name).mkdir()
        return folder_with(tmp_path / name, **changed)

    whole = folder("whole")
    refused("no folder .*nowhere; expected a folder of LLM4CP's .mat files", tmp_path / "nowhere")
    refused("no .mat file holds a key such as H_U_his_train", tmp_path)
    refused(
        "no .mat file holds H_U_his_test; found H_D_pre_train, H_U_his_train, H_U_pre_train",
        whole,
        split="test",
    )
    refused(
        r"H_U_his_train has axes \[3, 2, 5, 16, 4, 3, 2\]; expected \[v, n, L, k, a, b, c\] with L = 16",
        folder("swapped", H_U_his=matlab_array(16, 1).swapaxes(2, 3)),
    )
    refused(
        r"must agree in speeds, users, .*, got \[3, 2, 16, 5, 4, 3, 2\] and \[3, 1, 4, 5, 4, 3, 2\]",
        folder("fewer", H_U_pre=matlab_array(4, 2)[:, :1]),
    )
    spoiled = matlab_array(16, 1)
    spoiled[0, 0, 3, 2, 1, 0, 0] = np.nan
    refused("history holds NaN or infinite values", folder("nan", H_U_his=spoiled))

    twice = folder("twice")
    write_mat(twice / "copy.mat", H_U_his_train=matlab_array(16, 1))
    refused("both copy.mat and train0.mat hold H_U_his_train", twice)

    old = folder("old")
    scipy.io.savemat(old / "train0.mat", {"H_U_his_train": np.ones(3)})
    refused("train0.mat is a MATLAB v5 file; expected v7.3: load it and save it again with '-v7.3'", old)

    cut = folder("cut")
    content = (cut / "train0.mat").read_bytes()
    for length in (0, 600, len(content) // 2, len(content) - 1):
        (cut / "train0.mat").write_bytes(content[:length])
        refused("train0.mat is not a whole MATLAB v7.3 .* may be truncated", cut)

    real = folder("real")
    with h5py.File(real / "train0.mat", "w") as file:
        file["H_U_his_train"] = matlab_array(16, 1).T.real
    refused("H_U_his_train holds float64; expected complex values", real)
    with pytest.raises(ValueError, match=r"data.duplex must be 'tdd' or 'fdd', got 'half'"):
        read_mat(whole, "half")


# --- .npz files -----------------------------------------------------------------------------------------


def npz_content(users: int = 4) -> dict[str, np.ndarray]:
    packed = np.random.default_rng(0).standard_normal((users, 20, K, A, 2))
    return {"H": packed, "gain_db": np.full(users, -100.0), "speed_kmh": np.linspace(10, 100, users)}


@pytest.mark.parametrize("width", ["f2", "f4", "f8"])
def test_every_entry_of_an_npz_lands_on_its_axes(tmp_path: Path, width: str) -> None:
    content = npz_content()
    content["H"] = content["H"].astype(width)
    np.savez(tmp_path / "x.npz", **content)
    data = read(tmp_path / "x.npz", scenario="uma-nlos")
    assert data.history.shape == (4, A, 16, K) and data.future.shape == (4, A, 4, K)
    assert set(data.scenario) == {"uma-nlos"} and data.speed_kmh.tolist() == content["speed_kmh"].tolist()
    raw = content["H"].astype(float) @ [1, 1j]  # (U, L, K, A)
    amplitude = (
        10 ** ((data.gain_db + 100) / 20)[:, None, None, None]
    )  # gain_db counts the file's -100 dB too
    np.testing.assert_allclose(data.history * amplitude, raw[:, :16].transpose(0, 3, 1, 2), rtol=2e-5)
    np.testing.assert_allclose(data.future * amplitude, raw[:, 16:].transpose(0, 3, 1, 2), rtol=2e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"H": npz_content()["H"][:, :19]},
            r"H is float64 of shape \(4, 19, 5, 4, 2\); expected .* 20 slots",
        ),
        ({"H": npz_content()["H"][..., 0]}, "H is float64 of shape"),
        ({"H": npz_content()["H"].astype(int)}, "H is int64 of shape"),
        ({"H": npz_content(0)["H"], "gain_db": np.ones(0), "speed_kmh": np.ones(0)}, "holds no channels"),
        ({"H": np.full((4, 20, K, A, 2), np.nan)}, "history holds NaN or infinite"),
        ({"H": np.zeros((4, 20, K, A, 2))}, "the history of user 0 is zero"),
        (
            {"speed_kmh": np.ones(3)},
            "speed_kmh is float64 of shape .3,.; expected one finite number .* 4 users",
        ),
        ({"gain_db": np.array([0, 0, 0, np.inf])}, "gain_db is float64 of shape"),
        ({"H": np.array([object()] * 4)}, "is not a whole .npz file of numbers"),
        ({"gain_db": None}, "must hold the keys H, gain_db, speed_kmh, found H, speed_kmh"),
    ],
)
def test_bad_npz_files_are_told_in_one_sentence(
    tmp_path: Path, changed: dict[str, np.ndarray | None], message: str
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **{key: value for key, value in (npz_content() | changed).items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_channels_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match=r"no file or folder .*x.npz; expected an .npz file or a folder"):
        read(path)
    with pytest.raises(ValueError, match=r"no file .*x.npz"):
        read_npz(path)
    np.savez(path, **npz_content())
    with pytest.raises(ValueError, match=r"x.npz holds one band, so data.duplex must be 'tdd'"):
        read(path, "fdd")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is not a whole .npz file"):
        read(path)
    text = tmp_path / "x.mat"
    text.touch()
    with pytest.raises(
        ValueError, match=r"expected an .npz file, or the folder that holds LLM4CP's .mat files"
    ):
        read(text)


# --- real files -----------------------------------------------------------------------------------------


@shared
def test_the_quadriga_set_reads_with_the_time_axis_in_order() -> None:
    data = read(SHARED / "quadriga_uma_nlos_train.npz")
    assert data.history.shape == (len(data), 16, 16, 48)
    np.testing.assert_allclose(np.mean(np.abs(data.history) ** 2, axis=(1, 2, 3)), 1, rtol=1e-5)
    assert -125 < np.mean(data.gain_db) < -95
    h = np.concatenate([data.history, data.future], axis=2)
    for low, high, expected in ((8, 12, (0.997, 0.966)), (45, 55, (0.957, 0.447))):
        some = h[(data.speed_kmh >= low) & (data.speed_kmh <= high)]
        found = [np.mean(some[:, :, lag:] * some[:, :, :-lag].conj()).real for lag in (1, 4)]
        np.testing.assert_allclose(found / np.mean(np.abs(some) ** 2), expected, atol=0.1)


@shared
@pytest.mark.parametrize("duplex", ["tdd", "fdd"])
def test_the_llm4cp_sample_reads_with_its_axes_named_right(duplex: str) -> None:
    data = read(SHARED / "llm4cp_layout_sample", duplex)
    assert data.history.shape == (12, 32, 16, 48) and data.future.shape == (12, 32, 4, 48)
    panel = data.history.reshape(12, 2, 4, 4, 16, 48)
    power = np.mean(np.abs(panel) ** 2, axis=(2, 3, 4, 5))
    assert np.mean(10 * np.log10(power[:, 0] / power[:, 1])) > 2  # V is the stronger polarisation
    rows = np.mean(panel[:, :, :, 1:] * panel[:, :, :, :-1].conj(), axis=(1, 2, 3, 4, 5))
    columns = np.mean(panel[:, :, 1:] * panel[:, :, :-1].conj(), axis=(1, 2, 3, 4, 5))
    assert np.mean(np.abs(rows)) > np.mean(np.abs(columns)) + 0.1
    # At 10 km/h the next slot of the same band is nearly the last one; the band above is not.
    jump = np.mean(np.abs(data.future[:4, :, 0] - data.history[:4, :, -1]) ** 2)
    assert (jump < 0.05) == (duplex == "tdd")
