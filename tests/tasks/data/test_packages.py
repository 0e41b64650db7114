"""The readers of the workloads' data, on files as their packages have them, a few lines long."""

import json
import wave

import numpy as np
import pytest

from tasks.data import DataError, packages, sources


def test_sqlite_is_bytes_split_in_order(tmp_path):
    code = b"/****** This file is an amalgamation ******/\n" + bytes(range(256)) * 4
    (tmp_path / "sqlite3.c").write_bytes(code)
    splits = packages.read_sqlite("sqlite", tmp_path)
    joined = np.concatenate([splits["train"]["bytes"], splits["valid"]["bytes"]])
    assert joined.tobytes() == code
    assert len(splits["valid"]["bytes"]) == len(code) // 10
    (tmp_path / "sqlite3.c").write_bytes(b"int main;")
    with pytest.raises(DataError, match="amalgamation"):
        packages.read_sqlite("sqlite", tmp_path)


def write_mail(folder, number, text):
    path = folder / "data" / "easy-ham-1" / f"{number:05d}.abc.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"id": str(number), "text": text}))


def test_mail_is_numbered_by_frequency_without_headers(tmp_path):
    for number in range(20):
        write_mail(tmp_path, number, "Subject: secret header\n\nthe cat the dog <b>the</b>")
    splits = packages.read_mail("mail", tmp_path)
    the, cat, dog = 2, 3, 4  # by frequency, then by name
    assert splits["train"]["words"][:6].tolist() == [the, cat, the, dog, the, 0]
    assert len(splits["train"]["words"]) == 18 * 6
    assert len(splits["valid"]["words"]) == 2 * 6


def test_words_of_validation_alone_are_unknown(tmp_path):
    for number in range(20):
        write_mail(tmp_path, number, "\n\nonly here" if number == 0 else "\n\ncommon words")
    words = packages.read_mail("mail", tmp_path)["valid"]["words"].tolist()
    assert words[:3] == [1, 1, 0]


def test_too_few_or_damaged_messages_are_refused(tmp_path):
    with pytest.raises(DataError, match="0 messages"):
        packages.read_mail("mail", tmp_path)
    write_mail(tmp_path, 1, ["no text"])
    with pytest.raises(DataError, match="not a message"):
        packages.read_mail("mail", tmp_path)


def write_cmudict(folder, lines):
    (folder / "cmudict.symbols").write_text("AH\nAH0\nB\nT\n")
    (folder / "cmudict.dict").write_text("\n".join(lines))


def test_cmudict_keeps_plain_words_and_their_first_pronunciation(tmp_path):
    write_cmudict(tmp_path, ["ab AH0 B # a comment", "ab(2) B B", "a.b. B", "'bout B T", "bat B AH T", "x B"])
    splits = packages.read_cmudict("cmudict", tmp_path)
    rows = [
        (tuple(spelling[spelling > 0].tolist()), tuple(sounds[sounds > 0].tolist()))
        for arrays in splits.values()
        for spelling, sounds in zip(arrays["spelling"], arrays["sounds"], strict=True)
    ]
    assert sorted(rows) == [((1, 2), (2, 3)), ((2, 1, 20), (3, 1, 4))]
    assert len(splits["valid"]["spelling"]) == 1


def test_cmudict_refuses_unknown_sounds(tmp_path):
    write_cmudict(tmp_path, ["bat B QQ T"])
    with pytest.raises(DataError, match="QQ"):
        packages.read_cmudict("cmudict", tmp_path)
    (tmp_path / "cmudict.dict").write_bytes("café K AH".encode("latin-1"))
    with pytest.raises(DataError, match="no text in UTF-8"):
        packages.read_cmudict("cmudict", tmp_path)


def write_qm9(folder, gaps, elements="['C','H']", places="[[0.,0,0],[2.0,0,4*^-1]]"):
    rows = "".join(f'"{elements}","{places}",{gap}\n' for gap in gaps)
    (folder / "qm9_part1.csv").write_text("Elements,XYZ_Ang,HOMO_LUMO_gap_au\n" + rows)


def test_qm9_is_centred_padded_and_standardised(tmp_path):
    write_qm9(tmp_path, range(1, 21))
    splits = packages.read_qm9("qm9", tmp_path)
    first = {field: array[0] for field, array in splits["train"].items()}
    assert first["elements"].tolist() == [2, 1] + [0] * 27
    np.testing.assert_allclose(first["positions"][:2], [[-1, 0, -0.2], [1, 0, 0.2]], rtol=1e-3)
    assert not first["positions"][2:].any()
    label = splits["train"]["label"]
    assert abs(label.mean()) < 1e-6
    assert abs(label.std() - 1) < 1e-6
    assert len(splits["valid"]["label"]) == 2


LARGE = {"elements": str(["C"] * 30), "places": str([[0.0, 0.0, 0.0]] * 30)}


@pytest.mark.parametrize("broken", [{"elements": "['Xe','H']"}, {"places": "[[0,0]]"}, {"elements": "nonsense"}, LARGE])
def test_damaged_molecules_are_refused(tmp_path, broken):
    write_qm9(tmp_path, [1.0], **broken)
    with pytest.raises(DataError, match="molecule 0"):
        packages.read_qm9("qm9", tmp_path)


def test_tables_that_end_early_are_refused(tmp_path):
    head, row = "Elements,XYZ_Ang,HOMO_LUMO_gap_au\n", "\"['C']\"\n"
    for text, message in ((head, "no molecule"), (head + row, "molecule 0")):
        (tmp_path / "qm9_part1.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            packages.read_qm9("qm9", tmp_path)


def write_sound(path, samples, rate=8000):
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples * 2**15).astype("<i2").tobytes())


def test_a_tone_lies_in_its_band(tmp_path):
    time = np.arange(8000) / 8000
    write_sound(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * time))
    write_sound(tmp_path / "b.wav", 0.5 * np.sin(2 * np.pi * 1000 * time))
    splits = packages.read_speech("speech", tmp_path)
    frames = splits["train"]["frames"]
    assert frames.shape == ((8000 - 256) // 80 + 1, 64)
    weights = packages.mel_bands()
    loudest = int(np.argmax(frames.mean(axis=0)))
    assert weights[32, loudest] > 0  # bin 32 of 129 is at 1,000 Hz
    assert frames.max() == 255


def test_mel_bands_are_triangles_that_cover_all_but_the_ends():
    weights = packages.mel_bands()
    assert weights.shape == (129, 64)
    assert weights.min() == 0
    assert weights.max() <= 1
    assert (weights[10:120].sum(axis=1) > 0).all()


def test_other_sounds_are_refused(tmp_path):
    write_sound(tmp_path / "a.wav", np.zeros(1000), rate=16_000)
    write_sound(tmp_path / "b.wav", np.zeros(1000))
    with pytest.raises(DataError, match="16000"):
        packages.read_speech("speech", tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFFnothing")
    with pytest.raises(DataError, match="damaged"):
        packages.read_speech("speech", tmp_path)


def test_whole_books(tmp_path):
    verses = {f"Genesis {chapter}:{verse}": f"# verse {verse}" for chapter in range(1, 4) for verse in (1, 2)}
    (tmp_path / "verses-1769.json").write_text(json.dumps(verses))
    assert sources.kjv_documents(tmp_path) == ["verse 1 verse 2"] * 3
    with pytest.raises(DataError, match="3 chapters"):
        packages.read_kjv("kjv", tmp_path)


def test_readers_are_deterministic(tmp_path):
    write_cmudict(tmp_path, [f"{'ab' * n}t B T" for n in range(1, 7)])
    once, again = (packages.read_cmudict("cmudict", tmp_path) for _ in range(2))
    assert sources.digest(once) == sources.digest(again)
