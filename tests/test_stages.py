"""Two stages: a quantizer, priors over its codes, images end to end; every stage resumes, and says what it needs."""

import numpy as np
import pytest
import torch

from fastgen.__main__ import main
from fastgen.models import VQVAE, VQVAE2, GatedPixelCNN, GPTPrior, PixelSNAIL, TwoStage
from fastgen.training_stages import beside, encode, encode_once, fingerprint, load_two_stage

pytestmark = pytest.mark.usefixtures("one_thread")


def quantizer(kind=VQVAE2, codes=6):
    return kind(1, 8, 0, 4, codes, 4, 2).eval()


def two_stage(codes=6, classes=0):
    torch.manual_seed(0)
    top = GatedPixelCNN(codes=codes, channels=8, layers=1, classes=classes)
    return TwoStage(quantizer(codes=codes), [top, PixelSNAIL(codes=codes, channels=8, layers=1, cond_codes=codes)])


def test_the_bound_has_the_priors_in_place_of_the_uniform_one():
    model = two_stage(classes=3).eval()
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
    top, bottom = model.quantizer.encode(x)
    log_p = model.priors[0].log_prob(top, labels) + model.priors[1].log_prob(bottom, cond=top)
    uniform = (4 + 16) * np.log(6)
    torch.testing.assert_close(model.elbo(x, labels), model.quantizer.elbo(x) + uniform + log_p)


def test_samples_are_the_priors_codes_decoded():
    model = two_stage().eval()
    uniforms = [torch.rand(3, 2, 3), torch.rand(3, 4, 6)]
    top = model.priors[0].sample(3, (2, 3), uniforms=uniforms[0])
    bottom = model.priors[1].sample(3, (4, 6), uniforms=uniforms[1], cond=top)
    drawn = model.sample(3, (8, 12), uniforms=uniforms)
    assert torch.equal(drawn, model.quantizer.decode(top, bottom))
    assert model.sample(0, (8, 12)).shape == (0, 1, 8, 12)
    seen = []
    model.sample(2, (8, 8), dtype=torch.bfloat16, backend="reference", progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_input():
    with pytest.raises(ValueError, match=r"priors must be 2, one for each map of codes, got 1"):
        TwoStage(quantizer(), [GatedPixelCNN(codes=6)])
    with pytest.raises(ValueError, match=r"priors\[0\] must have codes=6 and cond_codes=0, .* got 5 and 0"):
        TwoStage(quantizer(VQVAE), [GPTPrior(5, (2, 2))])
    with pytest.raises(ValueError, match=r"priors\[1\] must have codes=6 and cond_codes=6, .* got 6 and 0"):
        TwoStage(quantizer(), [GatedPixelCNN(codes=6), GatedPixelCNN(codes=6)])
    model = two_stage(classes=3)
    with pytest.raises(ValueError, match=r"image_size must be two multiples of 4, got \(8, 6\)"):
        model.sample(1, (8, 6))
    with pytest.raises(ValueError, match="labels are for priors of classes; these have 3"):
        model.sample(1, (8, 8))


def test_encodes_once(tmp_path, monkeypatch):
    model, images = quantizer(), torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    path = tmp_path / "q.pt"
    first = encode_once(path, model, images)
    assert all(torch.equal(a, b) for a, b in zip(first, encode(model, images), strict=True))
    monkeypatch.setattr("fastgen.training_stages.encode", lambda *_: pytest.fail("encoded again"))
    assert all(torch.equal(a, b) for a, b in zip(first, encode_once(path, model, images), strict=True))
    monkeypatch.undo()
    assert len(encode_once(path, model, images[:3])[0]) == 3
    before = fingerprint(model)
    model.top_quantizer.state_dict()
    next(model.parameters()).data[0] += 1
    assert fingerprint(model) != before


@pytest.fixture
def data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(40) % 4)
    return tmp_path / "data.npz"


SMALL = ["--hidden-channels", "8", "--residual-layers", "0", "--codebook-size", "6", "--code-dim", "4"]


@pytest.mark.parametrize(
    ("name", "priors", "levels"),
    [("vqvae", [], ["codes"]), ("vqvae2", ["--priors", "gpt", "pixelsnail", "--class-labels"], ["top", "bottom"])],
)
def test_one_command_and_its_stages(name, priors, levels, data, tmp_path, capsys):
    out = tmp_path / "runs" / "a.pt"
    sizes = ["--prior-channels", "8", "--prior-layers", "1"]
    base = ["train", name, "--data", str(data), "--out", str(out), "--batch-size", "4", "--then", "prior", *priors]
    assert main([*base, *SMALL, *sizes, "--steps", "2", "--prior-steps", "3"]) == 0
    said = capsys.readouterr().out
    assert all(f"prior of {level}: step 3" in said for level in levels)
    assert out.with_suffix(".samples.png").stat().st_size > 100
    codes = np.load(out.with_suffix(".codes.npz"))
    assert sorted(codes.files) == sorted(["made_of", *levels])

    assert main([*base, *sizes, "--steps", "2", "--prior-steps", "5", "--resume"]) == 0  # the priors alone go on
    said = capsys.readouterr().out
    assert "has its 2 steps" in said
    assert all(f"prior of {level}: step 5" in said for level in levels)
    whole = tmp_path / "whole.pt"
    again = [str(whole) if word == str(out) else word for word in base]
    assert main([*again, *SMALL, *sizes, "--steps", "2", "--prior-steps", "5"]) == 0
    for level in levels:
        a, b = (torch.load(beside(p, level))["state_dict"] for p in (out, whole))
        assert all(torch.equal(a[k], b[k]) for k in a), "not as an uninterrupted run"

    picture = tmp_path / "drawn.png"
    draw = ["sample", "vqvae", str(out), "--out", str(picture), "--number", "3", "--dtype", "bfloat16", "--top-k", "4"]
    assert main([*draw, *(["--label", "3"] if "--class-labels" in priors else [])]) == 0
    assert "3 images of 8 x 8 pixels" in capsys.readouterr().out
    assert picture.exists()
    assert load_two_stage(out)[1] == (8, 8)

    assert main([*base, "--steps", "2"]) == 2
    assert "exists; add --resume" in capsys.readouterr().err
    assert main([*base, "--steps", "9", "--resume"]) == 2  # the codes would change under the priors
    assert f"a.{levels[0]}.pt: exists" in capsys.readouterr().err
    assert torch.load(out)["step"] == 2
    other = torch.load(out)
    other["state_dict"] = {k: v + 1 if v.is_floating_point() else v for k, v in other["state_dict"].items()}
    torch.save(other, out)
    for command in (draw, ["train", "prior", "--of", str(out), "--data", str(data), "--steps", "9", "--resume"]):
        assert main(command) == 2
        assert "is a prior over other codes than those of this quantizer" in capsys.readouterr().err


def test_a_stage_says_what_it_needs(data, tmp_path, capsys):
    out = tmp_path / "a.pt"
    prior = ["train", "prior", "--of", str(out), "--data", str(data), "--steps", "1", "--prior-channels", "8"]
    assert main(prior) == 2
    assert (
        "train the quantizer first: python -m fastgen train vqvae (or vqvae2, speech_vqvae) --steps N --out"
        in capsys.readouterr().err
    )
    assert main(["train", "vqvae", "--data", str(data), "--out", str(out), "--steps", "1", *SMALL]) == 0
    capsys.readouterr()
    assert main(["sample", "vqvae", str(out), "--out", str(tmp_path / "b.png")]) == 2
    assert f"train the prior first: python -m fastgen train prior --steps N --of {out}" in capsys.readouterr().err
    assert main([*prior, "--priors", "gpt", "gpt"]) == 2
    assert "kinds must be 1 of gated_pixelcnn, pixelsnail, gpt, got gpt, gpt" in capsys.readouterr().err
    assert main([*prior, "--prior-layers", "1"]) == 0
    assert main([*prior, "--prior-layers", "1"]) == 2
    assert "exists; resume from it, or remove it" in capsys.readouterr().err
    assert main([*prior, "--resume", "--prior-layers", "2"]) == 2
    assert "is another prior than asked for" in capsys.readouterr().err
    assert main(["train", "vqvae", "--data", str(data), "--out", str(tmp_path / "c.pt"), "--steps", "2", *SMALL]) == 0
    (tmp_path / "c.codes.pt").write_bytes(beside(out, "codes").read_bytes())
    assert main(["sample", "vqvae", str(tmp_path / "c.pt"), "--out", str(tmp_path / "b.png")]) == 2
    assert "other codes" in capsys.readouterr().err


def test_labels_that_a_finished_prior_does_not_know_and_damaged_codes(tmp_path, capsys):
    out = tmp_path / "q.pt"
    train = [
        "train", "vqvae", "--out", str(out), "--steps", "2", "--batch-size", "8", "--hidden-channels", "8",
        "--residual-channels", "4", "--codebook-size", "6", "--code-dim", "4", "--then", "prior",
        "--prior-channels", "8", "--prior-layers", "1",
    ]  # fmt: skip
    assert main([*train, "--priors", "gpt", "gpt"]) == 2
    assert "kinds must be 1 of" in capsys.readouterr().err
    assert not out.exists()
    assert main([*train[:-6], "--priors", "gpt"]) == 2
    assert "--priors: needs --then prior" in capsys.readouterr().err
    assert main(train) == 0
    assert main([*train, "--resume", "--class-labels"]) == 2
    assert "is a prior of 0 classes, the labels given are of 10" in capsys.readouterr().err
    codes = out.with_suffix(".codes.npz")
    whole = codes.read_bytes()
    codes.write_bytes(whole[:300])
    assert main([*train, "--prior-steps", "3", "--resume"]) == 0
    assert len(codes.read_bytes()) == len(whole)
    capsys.readouterr()
    assert main(["evaluate", str(out)]) == 0
    assert "-log2 p(codes), codes: " in capsys.readouterr().out


def test_what_belongs_to_a_quantizer_is_named_after_it():
    names = [beside(f"runs/{name}", "top").name for name in ("a.pt", "a.ckpt", "a.1", "a.2")]
    assert names == ["a.top.pt", "a.ckpt.top.pt", "a.1.top.pt", "a.2.top.pt"]


def test_the_stages_must_fit_each_other():
    with pytest.raises(TypeError, match="quantizer must be a VQVAE or VQVAE2, got Linear"):
        TwoStage(torch.nn.Linear(2, 2), [])
    with pytest.raises(TypeError, match="priors must be PixelModels, got Linear"):
        TwoStage(quantizer(VQVAE), [torch.nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--then prior --prior-channels 0", "channels must be"),
        ("--then prior --prior-layers -1", "layers must be"),
        ("--then prior --priors gpt --prior-channels 30", "heads"),
        ("--prior-layers 2", "--prior-layers: needs --then prior"),
    ],
)
def test_what_the_second_stage_would_refuse_is_refused_before_the_first(options, message, data, tmp_path, capsys):
    out = tmp_path / "first.pt"
    assert main(["train", "vqvae", "--data", str(data), "--out", str(out), "--steps", "1", *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
