"""Training: it learns, resumes exactly, and its checkpoints load strictly."""

import math
import signal
import threading
from pathlib import Path

import pytest
import torch

from fastgen.audio import mu_law_encode
from fastgen.models import WaveNet
from fastgen.training import TrainingLog, load_wavenet, save_checkpoint, train_wavenet, validate

RATE = 8000


pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options: object) -> WaveNet:
    torch.manual_seed(0)
    return WaveNet(**{"layers": 4, "residual_channels": 8, "skip_channels": 16, "classes": 32, **options})  # type: ignore[arg-type]


def tone(seconds: float = 0.5) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * 400 * torch.arange(int(RATE * seconds)) / RATE)


def train(model: WaveNet, **options: object) -> TrainingLog:
    options = {"batch_size": 2, "segment": 128, "learning_rate": 1e-2, "progress": False, **options}
    return train_wavenet(model, [tone(), tone(0.01)], RATE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("distribution", ["categorical", "logistic", "gaussian"])
def test_the_loss_falls_on_held_out_audio(distribution: str) -> None:
    model = small(distribution=distribution, mixtures=2)
    x = mu_law_encode(tone(), 32) if distribution == "categorical" else tone()
    before = validate(model, x)
    log = train(model, steps=60, schedule="cosine")  # the Gaussian's loss jumps as long as the rate is high
    assert len(log.losses) == log.step == 60
    assert log.validation[-1][0] == 60
    assert log.validation[-1][1] < before - 1
    assert sum(log.losses[-10:]) < sum(log.losses[:10]) - 10


def test_validation_is_bits_per_sample() -> None:
    model = small()
    for parameter in model.output.parameters():
        torch.nn.init.zeros_(parameter)
    assert validate(model, torch.randint(0, 32, (20000,))) == pytest.approx(5.0, abs=1e-4)


@pytest.mark.parametrize("split", [1, 4])
def test_resumed_training_is_the_uninterrupted_one(tmp_path: Path, split: int) -> None:
    whole, parts = small(), small()
    expected = train(whole, steps=7)
    path = tmp_path / "a.pt"
    first = train(parts, steps=split, checkpoint=path)
    again, rate = load_wavenet(path)
    assert rate == RATE
    second = train(again, steps=7, checkpoint=path, resume=True)
    assert first.losses + second.losses == expected.losses
    assert second.step == 7
    assert second.validation == expected.validation
    for name, tensor in load_wavenet(path)[0].state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_bfloat16_is_of_the_products_alone() -> None:
    models = small(), small()
    exact, rounded = (train(m, steps=3, precision=p) for m, p in zip(models, ("float32", "bfloat16"), strict=True))
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in models[1].parameters())
    assert rounded.validation[-1][1] == validate(models[1], mu_law_encode(torch.cat([tone(), tone(0.01)]), 32)[3672:])


def test_the_seed_chooses_the_segments() -> None:
    losses = [train(small(), steps=2, seed=seed).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_checkpoints_are_plain_data_and_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.pt"
    model = small(upsample_scales=(2, 3), local_channels=4, weight_norm=True)
    save_checkpoint(path, model, RATE, step=3)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"config", "state_dict", "optimizer", "step", "rate", "rng"}
    again, _ = load_wavenet(path)
    assert again.config == model.config
    before = path.read_bytes()

    def half(content: object, file: Path) -> None:
        Path(file).write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model, RATE)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_loading_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, small(), RATE)
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    state["surplus.weight"] = state.pop("hidden.bias")
    state["output.bias"] = state["output.bias"][:5]
    torch.save(content, path)
    with pytest.raises(
        ValueError,
        match=r"a\.pt: .*missing: hidden\.bias; surplus: surplus\.weight; misshapen: output\.bias \(5,\) for \(32,\)",
    ):
        load_wavenet(path)
    content["config"]["layers"] = -1
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.pt: config does not describe a WaveNet: .*layers"):
        load_wavenet(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"a\.pt: no such file"):
        load_wavenet(path)
    for content, why in ((b"", "is empty"), (b"text", "no file that torch.save"), (b"PK\x03\x04 cut", "cut short")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.pt: expected a checkpoint of train_wavenet, .*{why}"):
            load_wavenet(path)
    save_checkpoint(path, small(), RATE)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a\.pt: expected a checkpoint"):
        load_wavenet(path)
    for other in ({"weights": torch.zeros(1)}, [1, 2], torch.zeros(3)):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"a\.pt: expected a checkpoint of train_wavenet, got (ent|list|Te)"):
            load_wavenet(path)
    torch.save({"model": "NADE"}, path)
    with pytest.raises(ValueError, match=r"a\.pt: expected a checkpoint of train_wavenet, got one of a NADE"):
        load_wavenet(path)
    torch.save(Path("a"), path)
    with pytest.raises(ValueError, match=r"of train_wavenet, it holds more than tensors and plain data$"):
        load_wavenet(path)


@pytest.mark.parametrize(
    ("entry", "damage", "message"),
    [
        (
            "optimizer",
            lambda state: state["state"][0].update(exp_avg=torch.zeros(2)),
            "damaged training state.*exp_avg",
        ),
        ("state_dict", lambda state: state.update({next(iter(state)): 5}), "no tensors: "),
        ("validation", lambda _: "x", "damaged training state"),
        ("seconds", lambda _: None, "damaged training state"),
    ],
)
def test_damaged_states_are_refused(entry: str, damage: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    train(small(), steps=1, checkpoint=path)
    content = torch.load(path)
    made = damage(content[entry])  # type: ignore[operator]
    if not isinstance(content[entry], dict):
        content[entry] = made
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        train(small(), steps=2, checkpoint=path, resume=True)


def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, small(), RATE)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 389568 vs 389520")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"a\.pt: could not be written whole; is the disk full\?"):
        save_checkpoint(path, small(), RATE)
    assert path.read_bytes() == before


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"a\.pt: no such file"):
        train(small(), steps=2, checkpoint=path, resume=True)
    train(small(), steps=2, checkpoint=path)
    with pytest.raises(FileExistsError, match=r"a\.pt: exists"):
        train(small(), steps=3, checkpoint=path)
    with pytest.raises(ValueError, match=r"is at step 2; steps must be larger, got 2"):
        train(small(), steps=2, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match=r"of another model: layers=4 \(model: 6\)"):
        train(small(layers=6), steps=3, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="8000 Hz, got 16000 Hz"):
        train_wavenet(small(), [tone()], 16000, steps=3, segment=128, checkpoint=path, resume=True, progress=False)
    save_checkpoint(path, small(), RATE)
    with pytest.raises(ValueError, match="holds no training state"):
        train(small(), steps=3, checkpoint=path, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({}, "steps or seconds"),
        ({"steps": 1, "seconds": 1.0}, "steps or seconds"),
        ({"seconds": math.nan}, "seconds must be finite"),
        ({"steps": 1, "batch_size": 0}, "batch_size"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 1, "learning_rate": "a"}, "learning_rate must be finite and > 0, got 'a'"),
        ({"steps": True}, "steps must be an integer >= 1, got True"),
        ({"steps": 1, "schedule": "linear"}, r"schedule must be one of \('constant', 'cosine'\), got 'linear'"),
        ({"steps": 1, "precision": "half"}, r"precision must be one of \('float32', 'bfloat16'\), got 'half'"),
        ({"steps": 1, "holdout": 1.0}, r"holdout must be a number of examples, or a share in \[0, 1\), got 1"),
        ({"steps": 1, "holdout": -1}, "holdout must be an integer >= 0, got -1"),
        ({"steps": 1, "holdout": math.nan}, "holdout must be a number of examples, or a share"),
        ({"steps": 1, "segment": 0}, "segment must be an integer >= 1, got 0"),
        ({"steps": 1, "segment": 5000}, "at least one segment of 5000 samples to train on, got 3672"),
        ({"steps": 1, "resume": True}, "resume=True needs checkpoint"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(small(), **options)


def test_progress_is_a_flag_or_a_function() -> None:
    with pytest.raises(TypeError, match="progress must be True, False or a function, got 'x'"):
        train(small(), steps=1, progress="x")


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match="train_wavenet: got an unexpected argument 'step'; the loop takes steps, seco"):
        train(small(), step=1)


def test_bad_clips_and_models() -> None:
    with pytest.raises(ValueError, match=r"clips\[1\] must be \(T,\) floating point, got \(2, 9\)"):
        train_wavenet(small(), [tone(), torch.zeros(2, 9)], RATE, steps=1)
    with pytest.raises(ValueError, match="got 0 "):
        train_wavenet(small(), [], RATE, steps=1)
    with pytest.raises(ValueError, match="without conditioning"):
        train(small(speakers=2), steps=1)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.output.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss became nan at step 1"):
        train(model, steps=2, checkpoint=tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_seconds_bound_the_training() -> None:
    log = train(small(), seconds=0.3)
    assert log.step > 1


def test_ctrl_c_keeps_the_step_in_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    expected = train(small(), steps=6).losses
    seen: list[float] = []
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(step: int, loss: float) -> None:
        seen.append(loss)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(small(), steps=6, checkpoint=path, progress=interrupt)
    assert seen == expected[:3]
    assert signal.getsignal(signal.SIGINT) is handler
    model, _ = load_wavenet(path)
    assert train(model, steps=6, checkpoint=path, resume=True).losses == expected[3:]


def test_it_runs_outside_the_main_thread() -> None:
    logs: list[TrainingLog] = []
    thread = threading.Thread(target=lambda: logs.append(train(small(), steps=1)))
    thread.start()
    thread.join()
    assert logs[0].step == 1
