"""The commands, as a user runs them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen.__main__ import main
from fastgen.audio import mu_law_decode, speech_path
from fastgen.training import load_wavenet

pytest.importorskip("soundfile", reason="soundfile is not installed")
pytest.importorskip("rich", reason="rich is not installed")

TINY = [
    "--layers", "4", "--residual-channels", "8", "--skip-channels", "8", "--segment", "256", "--batch-size", "2",
    "--rate", "8000",
]  # fmt: skip


def fastgen_command(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "fastgen", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_one_line(status: int, message: str, pattern: str) -> None:
    assert status == 2, message
    assert message.count("\n") == 1, message
    assert re.search(pattern, message), message


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    result = fastgen_command(
        "train", "wavenet", "--data", speech_path(), "--out", "new/a.pt", "--steps", 3, *TINY, cwd=folder
    )
    assert result.returncode == 0, result.stderr
    assert "step 3, loss" in result.stdout
    return folder / "new" / "a.pt"


def test_info(tmp_path: Path) -> None:
    result = fastgen_command("info", cwd=tmp_path, FASTGEN_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"^fastgen +{re.escape(fastgen.__version__)}$", result.stdout, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", result.stdout, re.M)
    assert re.search(r"^FASTGEN_BACKEND +reference$", result.stdout, re.M)
    for op in fastgen.ops.OPS:
        assert re.search(rf"^{op}: .*reference$", result.stdout, re.M), op
    for backend in fastgen.backend.BACKENDS:
        reason = fastgen.backend.why_not("wavenet_generate", backend)
        assert reason is None or f"not {backend}: {reason}" in result.stdout


def test_info_without_the_optional_packages(tmp_path: Path) -> None:
    for package in ("rich", "soundfile", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('hidden')\n")
    assert fastgen_command("info", cwd=tmp_path, PYTHONPATH=str(tmp_path)).returncode == 0
    result = fastgen_command("demo", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert_one_line(result.returncode, result.stderr, r"pip install fastgen-kernels\[demo\]")
    assert not (tmp_path / "out").exists()


def test_train_resumes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(trained.read_bytes())
    train = ["train", "wavenet", "--data", str(speech_path()), "--out", str(path), "--steps", "4"]
    assert_one_line(main([*train, *TINY]), capsys.readouterr().err, "exists; add --resume")
    assert_one_line(main([*train, "--resume", "--layers", "6"]), capsys.readouterr().err, "leave out --layers 6")
    assert path.read_bytes() == trained.read_bytes()
    assert main([*train, "--resume", "--segment", "256", "--batch-size", "2"]) == 0
    assert torch.load(path, weights_only=True)["step"] == 4


def test_sample(trained: Path, tmp_path: Path) -> None:
    import soundfile

    path = tmp_path / "new" / "a.wav"
    command = ["sample", "wavenet", str(trained), "--seconds", "0.05", "--backend", "reference", "--out", str(path)]
    result = fastgen_command(*command, "--seed", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    wavs = [path.read_bytes()]
    for seed in ("1", "2"):
        assert main([*command, "--seed", seed]) == 0
        wavs.append(path.read_bytes())
    assert wavs[0] == wavs[1] != wavs[2]
    x, rate = soundfile.read(path, dtype="float32")
    assert (len(x), rate) == (400, 8000)
    model, _ = load_wavenet(trained)
    expected = model.generate(400, generator=torch.Generator().manual_seed(2), backend="reference")
    assert float((torch.from_numpy(x) - mu_law_decode(expected[0])).abs().max()) < 1e-4
    assert main([*command, "--seed", "2", "--top-k", "9", "--top-p", "0.8"]) == 0
    fewer = model.generate(400, top_k=9, top_p=0.8, generator=torch.Generator().manual_seed(2), backend="reference")
    assert not torch.equal(fewer, expected)
    drawn = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    assert float((drawn - mu_law_decode(fewer[0])).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ("sample wavenet missing.pt --out a.wav", r"missing\.pt: no such file"),
        ("sample wavenet text.pt --out a.wav", r"text\.pt: expected a checkpoint"),
        ("sample wavenet CHECKPOINT --out a.mp3", r"must end in \.wav"),
        ("sample wavenet missing.pt --out a.mp3", r"must end in \.wav"),  # said before anything is done
        ("sample wavenet CHECKPOINT --out a.wav --seconds 1e-9", "steps must be an integer >= 1, got 0"),
        ("sample wavenet CHECKPOINT --out a.wav --temperature 0", "temperature must be finite and > 0"),
        ("sample wavenet CHECKPOINT --out a.wav --top-p 2", r"top_p must be a float in \(0, 1\], got 2\.0"),
        ("sample wavenet CHECKPOINT --out a.wav --backend cuda", "'cuda' was requested but cannot run"),
        ("train wavenet --data missing --out a.pt --steps 1", "missing: no such file"),
        ("train wavenet --data . --out a.pt --steps 1", "expected WAV or FLAC files in this folder"),
        ("train wavenet --data text.pt --out a.pt --steps 1", r"text\.pt: expected a WAV or FLAC file"),
        ("train wavenet --data text.pt --out a.pt --steps 1", r"the formats are \.wav and \.flac, not \.pt"),
        ("train wavenet --data SPEECH --out a.pt --steps 0", "steps must be an integer >= 1, got 0"),
        ("train wavenet --data SPEECH --out a.pt --steps 1 --layers 3", "layers must be a multiple of cycles"),
        ("train wavenet --data SPEECH --out a.pt --steps 1 --resume", r"a\.pt: no such file"),
        ("demo --data missing", "missing: no such file"),
    ],
)
def test_errors_are_one_line(
    arguments: str, pattern: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("text")
    words = {"CHECKPOINT": str(trained), "SPEECH": str(speech_path())}
    status = main([words.get(word, word) for word in arguments.split()])
    assert_one_line(status, capsys.readouterr().err, pattern)
    assert [p.name for p in tmp_path.iterdir()] == ["text.pt"]


@pytest.mark.parametrize("command", ["info", "bench"])
def test_unknown_options_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--nonsense"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["inf", "nan", "0", "-1", "long"])
@pytest.mark.parametrize("command", ["sample wavenet a.pt --out a.wav", "demo"])
def test_seconds_are_finite_and_positive(command: str, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), f"--seconds={seconds}"])
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"argument --seconds: expected a finite number of seconds > 0, got '{seconds}'")


def test_bench_help_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--help"])
    assert caught.value.code == 0
    assert "--table" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["FASTGEN_BACKEND", "FASTGEN_CPU_ISA"])
def test_wrong_environment_is_one_line(variable: str, tmp_path: Path) -> None:
    """Importing the package raises; the command, which cannot catch that, says it all the same in one line."""
    result = fastgen_command("info", cwd=tmp_path, **{variable: "fast"})
    assert_one_line(result.returncode, result.stderr, rf"^fastgen: {variable}: expected one of .*, got 'fast'$")


def test_ctrl_c_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "fastgen", "train", "wavenet", "--data", speech_path(), "--out", "a.pt"]
    command += ["--steps", "1000000", "--save-every", "5", *TINY]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "a.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors == "interrupted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] >= 5


def test_demo(tmp_path: Path) -> None:
    import soundfile

    result = fastgen_command("demo", "--seconds", 1, "--out", "new", cwd=tmp_path, COLUMNS="200")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "new" / "sample.png").read_bytes().startswith(b"\x89PNG")
    info = soundfile.info(tmp_path / "new" / "sample.wav")
    assert info.frames == info.samplerate
    _, rate = load_wavenet(tmp_path / "new" / "wavenet.pt")
    assert rate == info.samplerate
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if line.startswith("│")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    names = ["naive loop (from 20 samples)", "PyTorch queue"]
    if fastgen.backend.why_not("wavenet_generate", "cpu") is None:
        names += ["fastgen float32", "fastgen bf16 weights"]
        mean, largest = map(float, table["fastgen bf16 weights"][4].split(", "))
        assert 0 <= mean <= largest < 1e-3
    others = ["65536 x 512 x 64", "32768 x 1024 x 8", "GatedPixelCNN", "PixelCNN", "PixelSNAIL"]
    assert list(table) == names + (others if len(names) == 4 else [])
    for picture in ("reconstructions.png", "digits.png"):
        assert (tmp_path / "new" / picture).read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert float(table[name][3]) < (0.5 if "bf16" in name else 1e-4), name
    speeds = [float(table[name][0].replace(",", "")) for name in names]
    assert speeds[1] > speeds[0]
