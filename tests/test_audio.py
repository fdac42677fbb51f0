"""Audio files and mu-law: values, round trips, resampling, and what bad files say."""

import math
import os
import struct
import tarfile
from pathlib import Path

import pytest
import torch

from fastgen.audio import load_audio, load_folder, mu_law_decode, mu_law_encode, resample, save_audio, speech_path

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")

DATA = Path(os.environ.get("FASTGEN_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def sine(frequency: float, rate: int, seconds: float, amplitude: float = 0.5) -> torch.Tensor:
    return (amplitude * torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds)).double() / rate)).float()


@pytest.mark.parametrize("classes", [2, 16, 255, 256, 1024, 65536])
def test_mu_law_round_trips_on_classes(classes: int) -> None:
    c = torch.arange(classes)
    assert torch.equal(mu_law_encode(mu_law_decode(c, classes), classes), c)
    assert mu_law_encode(torch.zeros(1), classes).item() == classes // 2


def test_mu_law_is_the_standards_curve() -> None:
    x = torch.tensor([-1.0, -0.1, 0.0, 0.5, 1.0])
    y = [math.copysign(math.log(1 + 255 * abs(v)) / math.log(256), v) for v in x.tolist()]
    assert mu_law_encode(x).tolist() == [math.floor((v + 1) / 2 * 255 + 0.5) for v in y]
    assert mu_law_encode(x).tolist() == [0, 52, 128, 239, 255]
    decoded = mu_law_decode(torch.tensor([0, 255]))
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [-1.0, 1.0]


def test_mu_law_error_is_at_most_half_a_step() -> None:
    x = torch.linspace(-1, 1, 10001)
    compand = lambda v: v.sign() * torch.log1p(255 * v.abs()) / math.log(256)  # noqa: E731
    assert float((compand(mu_law_decode(mu_law_encode(x))) - compand(x)).abs().max()) <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.tensor([1.5]), ValueError, r"x must lie in \[-1, 1\], got 1.5"),
        (torch.tensor([math.nan]), ValueError, "got nan"),
        (torch.tensor([1]), TypeError, "int64"),
    ],
)
def test_mu_law_encode_refuses(x: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mu_law_encode(x)


def test_mu_law_decode_refuses() -> None:
    with pytest.raises(ValueError, match=r"\[0, 256\), got 3 to 256"):
        mu_law_decode(torch.tensor([3, 256]))
    with pytest.raises(TypeError, match="float32"):
        mu_law_decode(torch.zeros(1))
    with pytest.raises(ValueError, match="classes must be an integer >= 2, got 1"):
        mu_law_decode(torch.tensor([0]), 1)


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(44100, 16000), (48000, 16000), (22050, 8000), (8000, 16000), (11025, 16001)]
)
def test_resample_keeps_a_tone_and_its_phase(rate: int, new_rate: int) -> None:
    y = resample(sine(1000, rate, 0.5), rate, new_rate)
    assert len(y) == math.ceil(rate // 2 * new_rate / rate)
    inside = slice(new_rate // 10, -new_rate // 10)
    assert float((y - sine(1000, new_rate, 0.6)[: len(y)])[inside].abs().max()) < 2e-5


def test_resample_removes_what_would_alias() -> None:
    y = resample(sine(8200, 44100, 0.5), 44100, 16000)
    assert float(y[1600:-1600].abs().max()) < 1e-4


def test_resample_refuses() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        resample(torch.zeros(2, 3), 8000, 16000)
    with pytest.raises(ValueError, match="new_rate must be an integer >= 1, in Hz, got 0"):
        resample(torch.zeros(3), 8000, 0)


@pytest.mark.parametrize(("suffix", "subtype"), [(".wav", "PCM_16"), (".wav", "FLOAT"), (".flac", "PCM_24")])
def test_load_averages_channels_and_resamples(tmp_path: Path, suffix: str, subtype: str) -> None:
    stereo = torch.stack([sine(500, 44100, 0.5, 0.8), sine(500, 44100, 0.5, 0.2)], 1)
    soundfile.write(tmp_path / f"a{suffix}", stereo.numpy(), 44100, subtype=subtype)
    x = load_audio(tmp_path / f"a{suffix}", 16000)
    assert x.dtype == torch.float32
    assert x.shape == (8000,)
    assert float((x - sine(500, 16000, 0.5))[800:-800].abs().max()) < 1e-4


def test_full_scale_stays_in_range(tmp_path: Path) -> None:
    square = torch.ones(4410)
    square[::2] = -1
    square[1000:2000] = 1
    soundfile.write(tmp_path / "a.wav", square.numpy(), 44100, subtype="FLOAT")
    assert float(load_audio(tmp_path / "a.wav", 16000).abs().max()) <= 1


def test_save_then_load(tmp_path: Path) -> None:
    x = sine(440, 16000, 0.1)
    path = tmp_path / "new" / "folder" / "a.wav"
    save_audio(path, x, 16000)
    assert soundfile.info(path).subtype == "PCM_16"
    assert float((load_audio(path, 16000) - x).abs().max()) <= 1 / 32768 + 1e-7
    assert [p.name for p in path.parent.iterdir()] == ["a.wav"]


def test_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    save_audio(path, sine(440, 16000, 0.1), 16000)
    before = path.read_bytes()

    def half(file: Path, *args: object, **options: object) -> None:
        Path(file).write_bytes(b"RIFF")
        raise OSError("no space left")

    monkeypatch.setattr(soundfile, "write", half)
    with pytest.raises(OSError, match="no space left"):
        save_audio(path, sine(220, 16000, 0.1), 16000)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("x", "name", "message"),
    [
        (torch.zeros(0), "a.wav", "T >= 1"),
        (torch.zeros(1, 5), "a.wav", r"\(1, 5\)"),
        (torch.tensor([0.0, 2.0]), "a.wav", r"\[-1, 1\], got 0.0 to 2.0"),
        (torch.tensor([math.nan]), "a.wav", "nan"),
        (torch.zeros(5), "a.mp3", "end in .wav"),
    ],
)
def test_save_refuses(tmp_path: Path, x: torch.Tensor, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_audio(tmp_path / name, x, 16000)
    assert not list(tmp_path.iterdir())


def test_bad_files_are_named(tmp_path: Path) -> None:
    contents = {
        "noise.wav": b"not audio at all",
        "zero.flac": b"",
        "raw.raw": b"1234",
        "cut.wav": b"RIFF\x24\x00\x00\x00WAVE",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=f"{name}: expected a WAV or FLAC file, got a file of {len(content)} bytes"
        ):
            load_audio(tmp_path / name, 16000)
    soundfile.write(tmp_path / "none.wav", torch.zeros(0).numpy(), 16000)
    with pytest.raises(ValueError, match=r"none\.wav: expected at least one sample"):
        load_audio(tmp_path / "none.wav", 16000)
    soundfile.write(tmp_path / "loud.wav", torch.full((9,), 3.0).numpy(), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"loud\.wav: expected samples in \[-1, 1\], got 3.0 to 3.0"):
        load_audio(tmp_path / "loud.wav", 16000)
    with pytest.raises(FileNotFoundError, match=r"missing\.wav: no such file"):
        load_audio(tmp_path / "missing.wav", 16000)
    with pytest.raises(ValueError, match="rate must be an integer >= 1, in Hz, got 0"):
        load_audio(tmp_path / "none.wav", 0)


def wav(data: bytes, size: int | None = None, before: bytes = b"", after: bytes = b"") -> bytes:
    """16 kHz mono 16-bit, whose header gives `size` for the data."""
    fmt = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
    body = fmt + before + b"data" + struct.pack("<I", len(data) if size is None else size) + data + after
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


ODD_CHUNK = b"LIST" + struct.pack("<I", 3) + b"abc\0"


@pytest.mark.parametrize("before", [b"", ODD_CHUNK])
@pytest.mark.parametrize("missing", [1, 2, 500, 1000])
def test_wav_files_cut_short_are_refused(tmp_path: Path, missing: int, before: bytes) -> None:
    path = tmp_path / "a.wav"
    whole = wav(bytes(1000), before=before)
    path.write_bytes(whole[:-missing])
    message = (
        rf"a\.wav: expected a whole WAV file, got a file of {len(whole) - missing} bytes.* {missing} bytes are missing"
    )
    with pytest.raises(ValueError, match=message):
        load_audio(path, 16000)


@pytest.mark.parametrize(
    "content",
    [
        wav(bytes(1000)),
        wav(bytes(1000), 0xFFFFFFFF),
        wav(bytes(1000), 0x7FFFF000),
        wav(bytes(1000), after=ODD_CHUNK),
        wav(bytes(1000), after=ODD_CHUNK)[:-5],  # the audio is whole
        wav(bytes(1000), before=ODD_CHUNK),
    ],
)
def test_wav_files_that_hold_what_they_say_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    assert len(load_audio(tmp_path / "a.wav", 16000)) >= 500


def test_wav_files_that_were_never_closed_are_read(tmp_path: Path) -> None:
    """Sizes of 0, as a recorder leaves them that was interrupted."""
    content = bytearray(wav(bytes(1000), 0))
    content[4:8] = struct.pack("<I", 8)
    (tmp_path / "a.wav").write_bytes(content)
    assert len(load_audio(tmp_path / "a.wav", 16000)) == 500


def test_flac_files_cut_short_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", sine(440, 16000, 1.0).numpy(), 16000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.flac: expected a WAV or FLAC file"):
        load_audio(tmp_path / "a.flac", 16000)


@pytest.mark.parametrize("name", ["a.mp3", "a.raw", "a.m4a", "a"])
def test_other_formats_are_told_apart(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not audio at all")
    suffix = r"\." + name[2:] if "." in name else "a name without suffix"
    with pytest.raises(ValueError, match=rf"unreadable: the formats are \.wav and \.flac, not {suffix}$"):
        load_audio(tmp_path / name, 16000)


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name, level in {"b.wav": 0.2, "a.FLAC": 0.1, "sub/c.wav": 0.3}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, torch.full((100,), level).numpy(), 8000, format=name.rsplit(".", 1)[1].upper())
    (tmp_path / "readme.txt").write_text("no audio")
    levels = [round(float(x[50]), 2) for x in load_folder(tmp_path, 8000)]
    assert levels == [0.1, 0.2, 0.3]
    assert len(load_folder(tmp_path / "b.wav", 8000)) == 1


def test_folder_without_audio(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no audio")
    with pytest.raises(FileNotFoundError, match="expected WAV or FLAC files in this folder, got none"):
        load_folder(tmp_path, 8000)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_folder(tmp_path / "missing", 8000)


def test_the_speech_that_comes_with_fastgen() -> None:
    assert soundfile.info(speech_path()).samplerate == 16000
    x = load_audio(speech_path(), 16000)
    assert 9 < len(x) / 16000 < 12
    assert 0.05 < float(x.std()) < 0.3


def test_spoken_digits(tmp_path: Path) -> None:
    archive = DATA / "fsdd" / "recordings.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is absent; FASTGEN_DATA names another folder")
    with tarfile.open(archive) as tar:
        digits = [m for m in tar.getmembers() if m.name.endswith("_jackson_0.wav")]
        tar.extractall(tmp_path, digits, filter="data")
    lengths = {m.name: soundfile.info(tmp_path / m.name).frames for m in digits}
    for rate in (8000, 16000):
        clips = load_folder(tmp_path, rate)
        assert [len(x) for x in clips] == [lengths[name] * rate // 8000 for name in sorted(lengths)]
        assert all(0.01 < float(x.std()) < 0.5 for x in clips)
    exact = soundfile.read(tmp_path / sorted(lengths)[0], dtype="float32")[0]
    assert torch.equal(load_folder(tmp_path, 8000)[0], torch.from_numpy(exact))
