"""Every form of sample data, what preprocessing computes, and one test for each thing that can be wrong."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from deploykit.core.artifact import TensorSpec
from deploykit.core.data import DataSet, Preprocess
from deploykit.core.errors import DeploykitError
from deploykit.sources import check_labels, from_python, load_data, load_preprocess, preprocess_image

X = (TensorSpec("x", ("batch", 4), "float32"),)
IMAGE = (TensorSpec("x", ("batch", 3, 8, 8), "float32"),)
ANY = (TensorSpec("x", (), ""),)
TWO = (TensorSpec("a", (), ""), TensorSpec("b", (), ""))


@pytest.fixture(autouse=True)
def _forget_user_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "loaders", raising=False)


def rows(n: int = 6) -> Any:
    return np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)


def pixels(n: int = 4, h: int = 8, w: int = 8, c: int = 3) -> Any:
    return np.random.default_rng(0).integers(0, 256, (n, h, w, c), np.uint8)


def refused(spec: object, inputs: Any = X, look: Preprocess | None = None, role: Any = "calibration") -> str:
    with pytest.raises(DeploykitError) as error:
        load_data(str(spec), inputs, look, role)
    return str(error.value)


def stacked(data: DataSet) -> Any:
    return next(data.batches(len(data))).inputs


def save_images(folder: Path, images: Any, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}{suffix}")


# ------------------------------------------------------------------ preprocessing


def test_preprocessing_is_the_formula_of_its_table() -> None:
    image = pixels(1)[0]
    p = Preprocess(scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    expected = (image / 255.0 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    given = preprocess_image(Image.fromarray(image), p)
    assert given.dtype == np.float32 and given.flags.c_contiguous
    np.testing.assert_allclose(given, expected.transpose(2, 0, 1), rtol=0, atol=2e-6)


def test_bgr_turns_the_channels_around_before_the_mean() -> None:
    image = pixels(1)[0]
    given = preprocess_image(Image.fromarray(image), Preprocess(scale=1.0, mean=(1, 2, 3), channels="BGR"))
    np.testing.assert_array_equal(given, (image[..., ::-1].astype(np.float32) - [1, 2, 3]).transpose(2, 0, 1))


def test_nhwc_keeps_the_channels_last() -> None:
    image = pixels(1)[0]
    np.testing.assert_array_equal(preprocess_image(Image.fromarray(image), Preprocess(scale=1, layout="NHWC")), image)


def test_grey_has_one_channel() -> None:
    grey = Image.fromarray(pixels(1)[0]).convert("L")
    given = preprocess_image(grey, Preprocess(scale=1, channels="L", mean=(7.0,)))
    np.testing.assert_array_equal(given, np.asarray(grey, np.float32)[None] - 7)


def test_resize_is_pillows_bilinear_of_the_shorter_side_and_the_crop_is_its_middle() -> None:
    image = Image.fromarray(pixels(1, 30, 51)[0])
    given = preprocess_image(image, Preprocess(resize=20, crop=(16, 18), scale=1))
    small = np.asarray(image.resize((34, 20), Image.Resampling.BILINEAR))  # 51 * 20 / 30 = 34
    np.testing.assert_array_equal(given, small[2:18, 8:26].transpose(2, 0, 1))


@given(st.integers(8, 60), st.integers(8, 60), st.integers(4, 40), st.booleans())
def test_sizes_are_rounded_as_torchvision_does(h: int, w: int, side: int, crop: bool) -> None:
    p = Preprocess(resize=side, crop=side if crop else None)
    short, long = min(h, w), max(h, w)
    longer = int(side * long / short)
    expected = (side, longer) if h <= w else (longer, side)
    given = preprocess_image(Image.new("RGB", (w, h)), p)
    assert given.shape == (3, side, side) if crop else (3, *expected)


def test_preprocessing_comes_from_toml_with_and_without_its_header(tmp_path: Path) -> None:
    expected = Preprocess(resize=256, crop=(224, 192), mean=(1.0, 2.0, 3.0), scale=1.0)
    body = "resize = 256\ncrop = [224, 192]\nmean = [1, 2, 3]\nscale = 1\n"
    for text in (body, f"[preprocess]\n{body}"):
        (tmp_path / "p.toml").write_text(text)
        assert load_preprocess(tmp_path / "p.toml") == expected
    assert load_preprocess({"preprocess": {"resize": 9}}, {"crop": 8}) == Preprocess(resize=9, crop=8)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"resise": 3}, "Did you mean 'resize'?"),
        ({"layout": "CHW"}, "layout must be NCHW or NHWC"),
        ({"std": [0.0]}, "std must be above 0"),
        ({"mean": [1, 2]}, "one for each of the 3 channels"),
        ({"crop": 0}, "at least 1 pixel"),
        ({"crop": "big"}, "crop"),
        ({"preprocess": {}, "train": {}}, "no table 'train'"),
        ({"preprocess": 3}, "a table is expected"),
    ],
)
def test_a_wrong_preprocess_table_says_what_is_wrong(table: dict[str, Any], expected: str) -> None:
    with pytest.raises(DeploykitError) as error:
        load_preprocess(table)
    assert expected in str(error.value) and "[preprocess]" in str(error.value)


# ------------------------------------------------------------------ folders of images


def test_a_flat_folder_is_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = pixels()
    save_images(tmp_path / "d", images)
    data = load_data(str(tmp_path / "d"), IMAGE, Preprocess(scale=1), "calibration")
    assert len(data) == 4 and data.labels is None
    np.testing.assert_array_equal(stacked(data)["x"], images.transpose(0, 3, 1, 2))


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = pixels(5)
    save_images(tmp_path / "d" / "zebra", images[:2])
    save_images(tmp_path / "d" / "ape", images[2:])
    (tmp_path / "d" / "cow").mkdir()
    data = load_data(str(tmp_path / "d"), IMAGE, Preprocess(scale=1), "eval")
    assert data.classes == ("ape", "cow", "zebra") and data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 2, 2] and data.labels.dtype == np.int64
    np.testing.assert_array_equal(stacked(data)["x"][3], images[0].transpose(2, 0, 1))


def test_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "d", pixels(6))
    data = load_data(str(tmp_path / "d"), IMAGE, Preprocess(), "eval")
    decoded: list[int] = []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda *a: (decoded.append(1), convert(*a))[1])
    next(data.batches(2))
    assert len(decoded) == 2


def test_grey_files_may_feed_an_rgb_network_and_colour_files_a_grey_one(tmp_path: Path) -> None:
    images = pixels()
    save_images(tmp_path / "grey", images[..., 0])
    save_images(tmp_path / "colour", images)
    x = stacked(load_data(str(tmp_path / "grey"), IMAGE, Preprocess(), "eval"))["x"]
    assert x.shape == (4, 3, 8, 8) and np.array_equal(x[:, 0], x[:, 2])
    look = Preprocess(channels="L")
    inputs = (TensorSpec("x", ("batch", 1, 8, 8), "float32"),)
    assert stacked(load_data(str(tmp_path / "colour"), inputs, look, "eval"))["x"].shape == (4, 1, 8, 8)


def test_a_folder_without_preprocessing_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(tmp_path / "d", pixels())
    data = load_data(str(tmp_path / "d"), IMAGE, None, "calibration")
    assert data.preprocess == Preprocess() and stacked(data)["x"].max() <= 1
    assert "no [preprocess] is declared" in capsys.readouterr().err


def test_hidden_files_are_not_images(tmp_path: Path) -> None:
    save_images(tmp_path / "d", pixels())
    (tmp_path / "d" / ".DS_Store").write_bytes(b"x")
    assert len(load_data(str(tmp_path / "d"), IMAGE, Preprocess(), "eval")) == 4


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no images" in refused(tmp_path)
    (tmp_path / "class").mkdir()
    assert "holds no images" in refused(tmp_path)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    save_images(tmp_path, pixels())
    (tmp_path / "notes.txt").write_text("hello")
    assert f"{tmp_path / 'notes.txt'} is not an image" in refused(tmp_path, IMAGE, Preprocess())


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    save_images(tmp_path, pixels(3, 64, 64), suffix)
    file = tmp_path / f"001{suffix}"
    file.write_bytes(file.read_bytes()[:700])
    data = load_data(str(tmp_path), ANY, Preprocess(), "eval")
    with pytest.raises(DeploykitError, match=rf"001\{suffix} is damaged"):
        list(data.batches(3))


def test_images_of_different_sizes_need_a_crop(tmp_path: Path) -> None:
    save_images(tmp_path, [pixels(1)[0], pixels(1, 10, 12)[0]])
    message = refused(tmp_path, ANY, Preprocess())
    assert "000.png is 8 x 8, 001.png 12 x 10" in message and "resize and crop" in message
    assert len(load_data(str(tmp_path), ANY, Preprocess(crop=8), "eval")) == 2


def test_an_image_smaller_than_the_crop_is_named(tmp_path: Path) -> None:
    save_images(tmp_path, pixels())
    message = refused(tmp_path, ANY, Preprocess(crop=9))
    assert "000.png is 8 x 8" in message and "at least 9" in message


def test_images_with_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path, pixels()[..., 0].astype(np.uint16) * 256)
    assert "more than 8 bits" in refused(tmp_path, ANY, Preprocess(channels="L"))


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path, pixels())
    save_images(tmp_path / "ape", pixels())
    assert "000.png lies beside the class folders" in refused(tmp_path, IMAGE, Preprocess())


@pytest.mark.parametrize(
    ("expected", "look", "hint"),
    [
        ((3, 4, 4), Preprocess(), "Set crop = 4"),
        ((3, 4, 6), Preprocess(), "Set crop = [4, 6]"),
        ((8, 8, 3), Preprocess(), "Set layout = 'NHWC'"),
        ((3, 8, 8), Preprocess(layout="NHWC"), "Set layout = 'NCHW'"),
        ((1, 8, 8), Preprocess(), "Set channels = 'L'"),
        ((3, 8, 8), Preprocess(channels="L"), "Set channels = 'RGB'"),
    ],
)
def test_a_wrong_image_shape_names_both_and_the_option_that_mends_it(
    tmp_path: Path, expected: tuple[int, ...], look: Preprocess, hint: str
) -> None:
    save_images(tmp_path, pixels())
    message = refused(tmp_path, (TensorSpec("x", ("batch", *expected), "float32"),), look)
    assert f"the model takes {list(expected)}" in message and hint in message


def test_a_folder_cannot_feed_two_inputs(tmp_path: Path) -> None:
    assert "2 inputs (a, b)" in refused(tmp_path, TWO)


# ------------------------------------------------------------------ arrays in files


def test_a_npy_is_memory_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows())
    data = load_data(str(tmp_path / "x.npy"), X, None, "calibration")
    assert isinstance(data.sample(0)["x"], np.memmap)
    np.testing.assert_array_equal(stacked(data)["x"], rows())


@pytest.mark.parametrize("key", ["y", "labels", "label"])
def test_a_npz_holds_inputs_by_name_and_labels(tmp_path: Path, key: str) -> None:
    a, b = rows(), rows().astype(np.int64)
    np.savez(tmp_path / "d.npz", a=a, b=b, **{key: np.arange(6, dtype=np.uint8)})
    data = load_data(str(tmp_path / "d.npz"), TWO, None, "eval")
    np.testing.assert_array_equal(stacked(data)["a"], a)
    np.testing.assert_array_equal(stacked(data)["b"], b)
    assert data.labels is not None and data.labels.dtype == np.int64 and data.labels.tolist() == list(range(6))


def test_the_only_array_of_a_npz_is_the_only_input_whatever_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=rows(), y=np.zeros(6, int))
    np.testing.assert_array_equal(stacked(load_data(str(tmp_path / "d.npz"), X, None, "eval"))["x"], rows())


def test_an_input_called_label_is_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", label=rows(), x=rows())
    inputs = (TensorSpec("x", (), ""), TensorSpec("label", (), ""))
    data = load_data(str(tmp_path / "d.npz"), inputs, None, "eval")
    assert data.labels is None and set(stacked(data)) == {"x", "label"}


def test_uint8_arrays_are_images_where_preprocessing_is_declared(tmp_path: Path) -> None:
    images = pixels(4, 12, 10)
    np.savez(tmp_path / "d.npz", x=images, y=np.arange(4))
    p = Preprocess(resize=9, crop=8, mean=(0.1, 0.2, 0.3))
    data = load_data(str(tmp_path / "d.npz"), IMAGE, p, "eval")
    expected = np.stack([preprocess_image(Image.fromarray(i), p) for i in images])
    np.testing.assert_array_equal(stacked(data)["x"], expected)
    assert data.preprocess == p


def test_floats_are_taken_as_they_come_even_with_preprocessing(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows())
    data = load_data(str(tmp_path / "x.npy"), X, Preprocess(), "calibration")
    np.testing.assert_array_equal(stacked(data)["x"], rows())
    assert data.preprocess is None


def test_two_dimensional_uint8_samples_are_grey_images_only_when_declared(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels()[..., 0])
    message = refused(tmp_path / "x.npy", IMAGE, Preprocess())
    assert "channels = 'RGB'" in message and "set channels = 'L'" in message
    data = load_data(str(tmp_path / "x.npy"), ANY, Preprocess(channels="L"), "eval")
    assert stacked(data)["x"].shape == (4, 1, 8, 8)


def test_channels_first_uint8_says_to_put_them_last(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels().transpose(0, 3, 1, 2))
    assert "array.transpose(0, 2, 3, 1)" in refused(tmp_path / "x.npy", IMAGE, Preprocess())


def test_colour_arrays_for_a_grey_declaration_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels())
    assert "set channels = 'RGB'" in refused(tmp_path / "x.npy", ANY, Preprocess(channels="L"))


def test_undeclared_uint8_images_say_what_to_declare(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels())
    message = refused(tmp_path / "x.npy", IMAGE)
    assert "uint8, the model takes float32" in message and "declare [preprocess]" in message


def test_channels_last_floats_say_to_put_them_first(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels().astype(np.float32))
    message = refused(tmp_path / "x.npy", IMAGE)
    assert "[8, 8, 3], the model takes [3, 8, 8]" in message and "array.transpose(0, 3, 1, 2)" in message


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_a_wrong_dtype_says_how_to_save_it(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", (rows() * 10).astype(dtype))
    message = refused(tmp_path / "x.npy")
    assert f"'x' is {dtype}, the model takes float32" in message and "astype('float32')" in message


def test_doubles_are_refused_even_where_the_model_does_not_say(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows().astype(np.float64))
    assert "astype('float32')" in refused(tmp_path / "x.npy", ANY)


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "inf")])
def test_a_sample_that_is_not_finite_is_named(tmp_path: Path, value: float, name: str) -> None:
    x = rows()
    x[4, 2] = value
    np.save(tmp_path / "x.npy", x)
    assert f"sample 4: 'x' holds {name}" in refused(tmp_path / "x.npy")


def test_identical_samples_cannot_calibrate_but_can_be_evaluated(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.tile(rows(1), (5, 1)))
    assert "all 5 samples are identical" in refused(tmp_path / "x.npy")
    assert len(load_data(str(tmp_path / "x.npy"), X, None, "eval")) == 5


def test_constant_images_cannot_calibrate(tmp_path: Path) -> None:
    save_images(tmp_path, np.full((3, 8, 8, 3), 7, np.uint8))
    assert "identical" in refused(tmp_path, IMAGE, Preprocess())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_are_refused(tmp_path: Path, count: int) -> None:
    np.save(tmp_path / "x.npy", rows(6)[:count])
    assert "sample" in refused(tmp_path / "x.npy")


def test_an_unknown_key_in_a_npz_is_answered_with_the_nearest(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=rows(), tokenz=rows())
    inputs = (TensorSpec("image", (), ""), TensorSpec("tokens", (), ""))
    assert "no input 'tokenz'. Did you mean 'tokens'?" in refused(tmp_path / "d.npz", inputs)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=rows())
    assert "no data for b" in refused(tmp_path / "d.npz", TWO)


def test_inputs_and_labels_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=rows(), y=np.zeros(5, int))
    assert "same length" in refused(tmp_path / "d.npz")


@pytest.mark.parametrize("name", ["d.npy", "d.npz"])
def test_damaged_and_pickled_array_files_are_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"nothing of the kind")
    assert name in refused(file)
    if name == "d.npy":
        np.save(file, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    else:
        np.savez(file, x=np.array([{"a": 1}, None], dtype=object))
    assert "Python objects" in refused(file)


def test_a_truncated_npz_is_named(tmp_path: Path) -> None:
    file = tmp_path / "d.npz"
    np.savez(file, x=rows(1000))
    with zipfile.ZipFile(file) as z:
        assert z.testzip() is None
    file.write_bytes(file.read_bytes()[:-500])
    assert "damaged" in refused(file)


def test_a_single_number_is_no_data(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.float32(3))
    assert "single number" in refused(tmp_path / "x.npy")


def test_a_file_of_another_kind_lists_the_forms(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2\n")
    assert "expected a folder of images, a .npy, a .npz or file.py:loader" in refused(tmp_path / "data.csv")


# ------------------------------------------------------------------ loaders and Python objects


LOADERS = """
import numpy as np
import torch

def batches():
    for k in range(3):
        yield np.full((2, 4), k, np.float32)

def shuffled():
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8))
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)

def fails():
    yield np.zeros((2, 4), np.float32)
    raise OSError("disk gone")

def number():
    return 7
"""


@pytest.fixture
def loaders(tmp_path: Path) -> Path:
    file = tmp_path / "loaders.py"
    file.write_text(LOADERS)
    return file


def test_a_loader_may_be_a_generator_of_batches(loaders: Path) -> None:
    data = load_data(f"{loaders}:batches", X, None, "calibration")
    assert stacked(data)["x"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_loader_is_the_same_for_the_same_seed_and_leaves_the_global_one_alone(loaders: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (load_data(f"{loaders}:shuffled", X, None, "train", seed) for seed in (1, 1, 2))
    assert first.hash == again.hash != other.hash
    assert torch.equal(state, torch.get_rng_state())


def test_a_loader_that_raises_is_one_line_with_its_place(loaders: Path) -> None:
    line = LOADERS.splitlines().index("def fails():") + 3
    assert f"OSError: disk gone (loaders.py, line {line})" in refused(f"{loaders}:fails")


def test_a_loader_that_returns_no_data_says_what(loaders: Path) -> None:
    assert "int is no data" in refused(f"{loaders}:number")


def test_a_wrong_loader_name_is_answered_with_the_nearest(loaders: Path) -> None:
    assert "Did you mean 'batches'?" in refused(f"{loaders}:batchs")


def dataset() -> TensorDataset:
    return TensorDataset(torch.from_numpy(rows()), torch.arange(6))


class Words(Dataset[Any]):
    """Samples as a dict by input name."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"a": rows()[i], "b": rows()[i] * 2, "label": i}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(row, i) for i, row in enumerate(rows())])


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: (rows(), np.arange(6)), id="tuple of arrays"),
        pytest.param(lambda: {"x": rows(), "y": np.arange(6)}, id="dict of arrays"),
        pytest.param(lambda: [(rows()[:4], np.arange(4)), (rows()[4:], [4, 5])], id="list of (inputs, labels)"),
        pytest.param(lambda: ({"x": rows()[i : i + 2], "y": np.arange(i, i + 2)} for i in (0, 2, 4)), id="dicts"),
        pytest.param(lambda: [(torch.from_numpy(rows()), torch.arange(6))], id="tensors"),
        pytest.param(dataset, id="Dataset"),
        pytest.param(lambda: DataLoader(dataset(), batch_size=4), id="DataLoader"),
        pytest.param(lambda: DataLoader(Stream(), batch_size=4), id="DataLoader of a stream"),
        pytest.param(lambda: DataLoader([(rows(), np.arange(6))], batch_size=None), id="DataLoader of whole batches"),
        pytest.param(lambda: DataSet.of({"x": rows()}, np.arange(6)), id="DataSet"),
    ],
)
def test_every_form_of_data_gives_the_same_samples(source: Any) -> None:
    data = from_python(source(), X)
    np.testing.assert_array_equal(stacked(data)["x"], rows())
    assert data.labels is not None and data.labels.tolist() == list(range(6)) and data.labels.dtype == np.int64
    np.testing.assert_array_equal(stacked(data)["x"], rows())  # again and again


@pytest.mark.parametrize("source", [rows, lambda: torch.from_numpy(rows()), lambda: [rows()[:3], rows()[3:]]])
def test_data_without_labels_has_none(source: Any) -> None:
    assert from_python(source(), X).labels is None


def test_labels_may_be_given_beside_the_data() -> None:
    given = from_python(rows(), X, labels=[5, 4, 3, 2, 1, 0]).labels
    assert given is not None and given.tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(DeploykitError, match="6 samples, but 2 labels"):
        from_python(rows(), X, labels=[1, 2])


def test_several_inputs_come_as_dicts_or_in_the_forwards_order() -> None:
    by_position = from_python([((rows(), rows() * 2), np.arange(6))], TWO)
    by_name = from_python(Words(), TWO)
    assert by_position.hash == by_name.hash


def test_a_data_loader_keeps_its_sampler_and_its_collate_function() -> None:
    subset = Subset(dataset(), [5, 1, 3])
    loader = DataLoader(subset, batch_size=2, collate_fn=lambda items: torch.stack([x for x, _ in items]) + 1)
    np.testing.assert_array_equal(stacked(from_python(loader, X))["x"], rows()[[5, 1, 3]] + 1)


def test_a_dataset_that_raises_names_the_sample() -> None:
    class Broken(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            return [rows()[0]][i]

    for source in (Broken(), DataLoader(Broken())):
        with pytest.raises(DeploykitError, match=r"sample 1 raised IndexError: list index out of range \(test_sources"):
            from_python(source, X)


def test_a_data_loader_is_asked_one_sample_at_a_time() -> None:
    asked: list[int] = []

    class Counting(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            asked.append(i)
            return rows()[i]

    data = from_python(DataLoader(Counting(), batch_size=3), X)
    asked.clear()
    next(data.batches(2))
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], "yields nothing"),
        ([rows(), rows()[:, :3]], "do not go together"),
        ([(rows(), [0] * 6), rows()], "only 1 of 2 batches have labels"),
        ([(rows(), rows(), rows())], "a tuple of 3"),
        ("some/path", "batch 0"),
        (object(), "object is no data"),
        ([{"x": rows(), "z": rows()}], "no input 'z'"),
        ([["a", "b"]], "no array of numbers"),
    ],
)
def test_unusable_python_data_says_why(data: Any, expected: str) -> None:
    with pytest.raises(DeploykitError) as error:
        from_python(data, X)
    assert expected in str(error.value)


def test_samples_of_another_shape_are_named() -> None:
    class Ragged(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            return rows()[0][: 4 - i // 2]

    with pytest.raises(DeploykitError, match=r"sample 2: 'x' is float32 \[3\], the first sample float32 \[4\]"):
        from_python(Ragged(), ANY)


# ------------------------------------------------------------------ labels


def labelled(labels: Any) -> DataSet:
    return DataSet.of({"x": rows()}, np.asarray(labels))


def test_labels_of_every_class_pass() -> None:
    check_labels(labelled([0, 1, 2, 2, 1, 0]), 3)
    check_labels(DataSet.of({"x": rows()}), 3)


@pytest.mark.parametrize(("labels", "sample"), [([0, 1, 2, 3, 1, 0], 3), ([0, -1, 2, 0, 0, 0], 1)])
def test_a_label_out_of_range_is_named(labels: list[int], sample: int) -> None:
    with pytest.raises(DeploykitError, match=rf"sample {sample} has label {labels[sample]}; the model has 3 classes"):
        check_labels(labelled(labels), 3)


def test_labels_that_start_at_one_are_recognised() -> None:
    with pytest.raises(DeploykitError, match="subtract 1"):
        check_labels(labelled([1, 2, 3, 1, 2, 3]), 3)


@pytest.mark.parametrize("labels", [np.zeros((6, 3), int), np.zeros(6, np.float32)])
def test_labels_that_are_no_class_numbers_are_refused(labels: Any) -> None:
    with pytest.raises(DeploykitError, match="must be class numbers"):
        check_labels(labelled(labels), 3)


def test_class_folders_must_be_all_classes(tmp_path: Path) -> None:
    save_images(tmp_path / "ape", pixels())
    save_images(tmp_path / "cow", pixels())
    data = load_data(str(tmp_path), IMAGE, Preprocess(), "eval")
    check_labels(data, 2)
    with pytest.raises(DeploykitError, match="2 class folders, the model has 3 classes"):
        check_labels(data, 3)
