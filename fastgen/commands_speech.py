"""The commands that train a VQ-VAE of speech and the prior over its codes, and generate audio with both."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fastgen.commands_images import check_new, check_resumed, check_then, loop_options, prior_sizes

SPEECH_SIZES = {
    "hidden-channels": 64, "codebook-size": 128, "code-dim": 32, "downsample": 64, "layers": 20, "cycles": 2,
    "residual-channels": 32, "skip-channels": 64,
}  # fmt: skip
HEARD = 3  # held-out clips in the file of reconstructions; samples in that of the prior


def train_speech_command(options: argparse.Namespace) -> None:
    """`train speech_vqvae`, and its prior with --then prior."""
    from fastgen.audio import check_output
    from fastgen.checkpoints import read_checkpoint
    from fastgen.models import SpeechVQVAE
    from fastgen.training_speech import load_speech_vqvae, train_speech_vqvae
    from fastgen.training_stages import check_priors

    chosen = {name: getattr(options, name) for name in (size.replace("-", "_") for size in SPEECH_SIZES)}
    given = {name: value for name, value in chosen.items() if value is not None}
    heard = options.out.with_suffix(".wav")
    check_output(heard)
    if options.resume:
        model, rate, length = load_speech_vqvae(options.out)
        check_resumed(options, model, SpeechVQVAE, given)
        for name, asked, held in (("rate", options.rate, rate), ("length", options.length, length)):
            if asked not in (None, held):
                raise ValueError(f"{options.out}: was trained with --{name} {held}: leave out --{name} {asked}")
        if options.then and read_checkpoint(options.out, ("step",), "train_speech_vqvae")["step"] >= options.steps:
            check_priors(options.out, model, resume=True)
            print(f"{options.out}: has its {options.steps} steps")
            train_speech_prior(options, options.out)
            return
    else:
        check_new(options)
        rate = 8000 if options.rate is None else options.rate
        length = 8192 if options.length is None else options.length
        torch.manual_seed(options.seed)
        sizes = {n.replace("-", "_"): v for n, v in SPEECH_SIZES.items()} | given
        model = SpeechVQVAE(**sizes, kmeans_init=True, threshold_ema_dead_code=1.0)  # type: ignore[arg-type]
        if length < 1 or length % model.downsample:
            raise ValueError(f"--length: must be a multiple of --downsample, {model.downsample}, got {length}")
    check_priors(options.out, model, resume=False)
    check_then(options, model)
    clips, _ = _clips(options, rate, length, model.classes)
    log = train_speech_vqvae(model.to(options.device), clips, rate, segment=options.segment, **loop_options(options))
    held_out = f", held out {log.validation[-1][1]:.3f}" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.3f} bits per sample{held_out} given the codes")
    shown = clips[-HEARD:]
    with torch.no_grad():
        codes, generator = model.eval().encode(shown.to(options.device)), torch.Generator().manual_seed(options.seed)
        again = model.decode(codes, generator=generator)
    _save(heard, torch.stack([shown, again.cpu()], 1), rate, model.classes)
    print(f"{heard}: {len(shown)} clips, each followed by what its codes decode to")
    if options.then:
        train_speech_prior(options, options.out)


def train_speech_prior(options: argparse.Namespace, path: Path) -> None:
    """The second stage, of a quantizer that has been trained."""
    from fastgen.training_speech import load_speech_vqvae
    from fastgen.training_stages import beside, train_priors

    model, rate, length = load_speech_vqvae(path)
    clips, labels = _clips(options, rate, length, model.classes)
    settings = loop_options(options) | {"steps": options.prior_steps or options.steps}
    del settings["checkpoint"]
    logs = train_priors(
        path, clips, labels if options.class_labels else None, kinds=options.priors or None,
        sizes=prior_sizes(options), device=options.device, **settings,
    )  # fmt: skip
    for log in logs.values():
        held_out = f", held out {log.validation[-1][1]:.4f}" if log.validation else ""
        print(f"prior of codes: step {log.step}, loss {log.losses[-1]:.4f} bits per code{held_out}")
    heard = beside(path, "samples", ".wav")
    drawn, rate = _draw(path, HEARD, options.seed, options.device)
    _save(heard, drawn, rate, model.classes)
    print(f"{heard}: {HEARD} samples")


def sample_speech(options: argparse.Namespace) -> None:
    """`sample speech_vqvae`."""
    from fastgen.audio import check_output
    from fastgen.training_speech import load_speech_vqvae

    check_output(options.out)
    classes = load_speech_vqvae(options.checkpoint)[0].classes
    drawn, rate = _draw(
        options.checkpoint, options.number, options.seed, options.device, label=options.label,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
    )  # fmt: skip
    _save(options.out, drawn, rate, classes)
    print(f"{options.out}: {options.number} clips of {drawn.shape[1] / rate:g} s at {rate} Hz")


def _draw(
    path: Path, number: int, seed: int, device: torch.device, *, label: int | None = None, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Clips (number, T) of classes, codes first, of which top_k and top_p are; without a label, of each class in turn;
    and their rate."""
    from fastgen.models import SpeechVQVAE
    from fastgen.training_speech import load_speech_vqvae
    from fastgen.training_stages import load_priors

    model, (prior,), size = load_priors(path)
    assert isinstance(model, SpeechVQVAE)
    classes, generator = prior.config["classes"], torch.Generator().manual_seed(seed)
    if label is not None and not classes:
        raise ValueError(f"{path}: its prior has no classes: leave out --label")
    labels = torch.arange(number, device=device) % classes if label is None and classes else None
    labels = labels if label is None else torch.full((number,), label, device=device)
    codes = (
        prior.to(device)
        .eval()
        .sample(number, size, labels=labels, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    )
    drawn = model.to(device).eval().decode(codes[:, 0], temperature=temperature, generator=generator, progress=True)
    return drawn.cpu(), load_speech_vqvae(path)[1]


def _clips(options: argparse.Namespace, rate: int, length: int, classes: int) -> tuple[Tensor, Tensor]:
    """Of the files: clips (N, length) of classes, and their labels."""
    from fastgen.audio import audio_files, load_audio
    from fastgen.training_speech import clips_of, labels_of

    files = audio_files(options.data, exclude=options.exclude)
    return clips_of([load_audio(file, rate) for file in files], length, classes), labels_of(files)


def _save(path: Path, clips: Tensor, rate: int, classes: int) -> None:
    from fastgen.audio import mu_law_decode, save_audio

    save_audio(path, mu_law_decode(clips.flatten(), classes), rate)
