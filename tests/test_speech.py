"""The VQ-VAE of speech: its bound, its WaveNet decoder, the prior over its codes, and the commands."""

import math

import pytest
import torch

from fastgen.__main__ import main
from fastgen.audio import load_audio, save_audio
from fastgen.evaluate import evaluate
from fastgen.models import SpeechVQVAE
from fastgen.training_speech import clips_of, labels_of, train_speech_vqvae

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options):
    torch.manual_seed(0)
    sizes = {"layers": 4, "cycles": 1, "residual_channels": 8, "skip_channels": 8, "classes": 32, **options}
    return SpeechVQVAE(8, 6, 4, 8, **sizes)


def test_the_bound_and_the_decoder():
    model = small().eval()
    x = torch.randint(32, (3, 64))
    log_p, codes, loss = model(x)
    assert codes.shape == (3, 8)
    assert torch.equal(codes, model.encode(x))
    local = model.quantizer.get_output_from_indices(codes).mT
    torch.testing.assert_close(log_p, model.decoder.log_prob(x, local))
    torch.testing.assert_close(model.elbo(x), log_p - 8 * math.log(6))
    torch.testing.assert_close(model.loss(x), -log_p.mean() / (64 * math.log(2)) + loss)
    uniforms = torch.rand(3, 64)
    drawn = model.decode(codes, uniforms=uniforms)
    assert torch.equal(drawn, model.decoder.generate(64, batch_size=3, local=local, uniforms=uniforms))
    with torch.no_grad():  # each sample is where its uniform falls in the distribution that forward gives
        cumulative = model.decoder(drawn, local).softmax(1).cumsum(1)
    naive = (cumulative <= uniforms[:, None]).sum(1)
    assert (naive != drawn).float().mean() < 0.01


def test_probabilities_given_the_codes_sum_to_one():
    model = small(classes=2).double().eval()
    every = torch.tensor([[int(b) for b in f"{i:08b}"] for i in range(256)])
    quantized = model.quantizer.get_output_from_indices(torch.tensor([[1]])).mT
    log_p = model.decoder.log_prob(every, quantized.expand(256, -1, -1))
    assert float(log_p.detach().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_learns_and_resumes(tmp_path):
    t = torch.arange(256) / 8000
    clips = clips_of([0.5 * torch.sin(2 * math.pi * f * t) for f in range(300, 900, 10)], 256, 32)
    losses = {}
    for parts in ((30,), (10, 30)):
        model, seen = small(), []
        for i, steps in enumerate(parts):
            log = train_speech_vqvae(
                model, clips, 8000, steps=steps, segment=64, learning_rate=1e-2, checkpoint=tmp_path / f"{parts}.pt",
                resume=i > 0, progress=False,
            )  # fmt: skip
            seen += log.losses
        losses[len(parts)] = seen
    assert losses[1] == losses[2]
    assert losses[1][-1] < losses[1][0] - 1


def test_clips_and_labels(tmp_path):
    clips = clips_of([torch.ones(3), torch.zeros(9)], 5)
    assert clips.tolist() == [[255, 255, 255, 128, 128], [128] * 5]
    assert labels_of([tmp_path / f"{word}_x_{i}.wav" for i, word in enumerate("bab")]).tolist() == [1, 0, 1]


def test_commands(tmp_path, capsys):
    pytest.importorskip("soundfile")
    for i in range(8):
        save_audio(tmp_path / "clips" / f"{i % 2}_me_{i}.wav", 0.5 * torch.sin(0.1 * (i + 1) * torch.arange(400)), 8000)
    out = tmp_path / "speech.pt"
    sizes = ["--hidden-channels", "8", "--codebook-size", "6", "--code-dim", "4", "--downsample", "8"]
    sizes += ["--layers", "4", "--cycles", "1", "--residual-channels", "8", "--skip-channels", "8", "--length", "256"]
    of_prior = ["--then", "prior", "--prior-channels", "8", "--prior-layers", "1", "--class-labels"]
    base = ["train", "speech_vqvae", "--data", str(tmp_path / "clips"), "--out", str(out), "--segment", "64"]
    base += ["--holdout", "2", "--exclude", "*_7.wav"]
    assert main([*base, *sizes, *of_prior, "--steps", "2"]) == 0
    assert "prior of codes: step 2" in capsys.readouterr().out
    assert len(load_audio(out.with_suffix(".wav"), 8000)) == 6 * 256
    assert main([*base, *of_prior[:2], "--class-labels", "--steps", "2", "--prior-steps", "4", "--resume"]) == 0
    assert "prior of codes: step 4" in capsys.readouterr().out
    drawn = tmp_path / "drawn.wav"
    assert (
        main(
            ["sample", "speech_vqvae", str(out), "--out", str(drawn), "--number", "2", "--label", "1", "--top-p", "0.9"]
        )
        == 0
    )
    assert "2 clips of 0.032 s at 8000 Hz" in capsys.readouterr().out
    assert len(load_audio(drawn, 8000)) == 512
    of = ["train", "prior", "--of", str(out), "--steps", "5", "--resume", "--class-labels", "--exclude", "*_7.wav"]
    assert main([*of, "--data", str(tmp_path / "clips"), "--holdout", "2"]) == 0
    assert "prior of codes: step 5" in capsys.readouterr().out
    figure, of_codes = evaluate(out, tmp_path / "clips", include="*_[0-4].wav")
    assert of_codes.name == "-log2 p(codes), codes"  # given the labels that the files' names are
    assert len(evaluate(out, tmp_path / "clips", include="0_*.wav")) == 1  # not all classes: whose is which, is unknown
    assert (figure.unit, figure.examples) == ("bits/sample", 5)
    for command, message in (
        (of, "is of speech; --data is needed"),
        ([*base, "--steps", "3", "--resume", "--rate", "9000"], "leave out --rate 9000"),
        ([*base, "--steps", "3", "--resume"], "speech.codes.pt: exists"),
        (["sample", "vqvae", str(out), "--out", "a.png"], "is of speech, not of images"),
        (["sample", "speech_vqvae", str(out), "--out", "a.png"], "path must end in .wav"),
        (["sample", "speech_vqvae", str(out), "--out", str(drawn), "--label", "2"], "labels must lie in [0, 2), got 2"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: small(classes=1), "classes must be an integer >= 2, got 1"),
        (lambda: SpeechVQVAE(downsample=48), "downsample must be a power of 2, got 48"),
        (lambda: small()(torch.zeros(1, 12).long()), "T must be a multiple of 8, got 12"),
        (lambda: small()(torch.zeros(1, 16)), r"x must be int64 \(B, T\), got torch.float32 \(1, 16\)"),
        (lambda: small()(torch.full((1, 16), 32)), r"\[0, 32\), got 32"),
        (lambda: small().decode(torch.full((1, 3), 6)), r"codes must lie in \[0, 6\), got 6"),
        (lambda: small().decode(torch.zeros(1, 0).long()), r"codes must be int64 \(B, frames\)"),
        (
            lambda: train_speech_vqvae(small(), torch.zeros(9, 64).long(), 8000, steps=1, segment=12),
            "segment must be a multiple of 8 of at most 64, got 12",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_clips_that_the_codes_do_not_divide_are_refused_before_the_training(tmp_path, capsys):
    save_audio(tmp_path / "a.wav", torch.zeros(9000), 8000)
    train = ["train", "speech_vqvae", "--data", str(tmp_path), "--out", str(tmp_path / "s.pt"), "--steps", "1"]
    assert main([*train, "--length", "5000"]) == 2
    assert "--length: must be a multiple of --downsample, 64, got 5000" in capsys.readouterr().err
    assert main([*train, "--rate", "0"]) == 2
    assert not (tmp_path / "s.pt").exists()
