"""python -m fastgen info | demo | train | sample | bench"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastgen
from fastgen.backend import BACKENDS, BackendError

USER_ERRORS = (ValueError, TypeError, ImportError, OSError, BackendError, FloatingPointError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {
    "layers": 20, "cycles": 2, "residual-channels": 64, "skip-channels": 128, "kernel-size": 2,
    "distribution": "categorical", "classes": 256, "mixtures": 10,
}  # fmt: skip
VQVAE_SIZES = {
    "hidden-channels": 128, "residual-layers": 2, "residual-channels": 32, "codebook-size": 512, "code-dim": 64,
    "downsample": 2,
}  # fmt: skip
PIXEL_SIZES = {
    "PixelCNN": {"channels": 64, "layers": 8},
    "GatedPixelCNN": {"channels": 64, "layers": 8},
    "PixelSNAIL": {"channels": 32, "layers": 3},
}
PIXEL_COMMANDS = {"pixelcnn": "PixelCNN", "gated_pixelcnn": "GatedPixelCNN", "pixelsnail": "PixelSNAIL"}
GRID_IMAGES = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> exit status: 0, 2 for a user's error, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except USER_ERRORS as error:
        print(f"fastgen {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _info(options: argparse.Namespace) -> None:
    from fastgen.info import report

    print(report())


def _demo(options: argparse.Namespace) -> None:
    from fastgen.demo import demo

    demo(options.data, options.out, options.seconds, options.only)


def _train(options: argparse.Namespace) -> None:
    from fastgen.audio import load_folder
    from fastgen.training import load_wavenet, train_wavenet

    chosen = {name: getattr(options, name) for name in (size.replace("-", "_") for size in SIZES)}
    given = {name: value for name, value in chosen.items() if value is not None}
    if options.resume:
        model, rate = load_wavenet(options.out)
        different = [f"--{n.replace('_', '-')} {v}" for n, v in given.items() if model.config[n] != v]
        if options.rate is not None and options.rate != rate:
            different.append(f"--rate {options.rate}")
        if different:
            raise ValueError(f"{options.out}: is of another model: leave out {', '.join(different)}, or --resume")
    else:
        if options.out.exists():  # said before any audio is read
            raise FileExistsError(f"{options.out}: exists; add --resume to go on from it, or choose another --out")
        rate = 16000 if options.rate is None else options.rate
        torch.manual_seed(options.seed)
        model = fastgen.models.WaveNet(**{n.replace("-", "_"): v for n, v in SIZES.items()} | given)  # type: ignore[arg-type]
    clips = load_folder(options.data, rate)
    log = train_wavenet(
        model, clips, rate, steps=options.steps, batch_size=options.batch_size, segment=options.segment,
        learning_rate=options.learning_rate, seed=options.seed, checkpoint=options.out,
        save_every=options.save_every, resume=options.resume,
    )  # fmt: skip
    held_out = f", held out {log.validation[-1][1]:.3f}" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.3f} bits per sample{held_out}")


def _train_vqvae(options: argparse.Namespace) -> None:
    from fastgen.images import load_images, pad_to_multiple, save_grid
    from fastgen.training_images import MODELS, as_floats, code_perplexities, load_vqvae, train_vqvae

    chosen = {name: getattr(options, name) for name in (size.replace("-", "_") for size in VQVAE_SIZES)}
    given = {name: value for name, value in chosen.items() if value is not None}
    grid = _grid_beside(options)
    if options.resume:
        model = load_vqvae(options.out)
        different = [f"--{n.replace('_', '-')} {v}" for n, v in given.items() if model.config[n] != v]
        if different or type(model) is not MODELS[options.model.upper()]:
            what = ", ".join(different) or f"the model is a {type(model).__name__}"
            raise ValueError(f"{options.out}: is of another model: leave out {what}, or --resume")
    elif options.out.exists():  # said before any image is read
        raise FileExistsError(f"{options.out}: exists; add --resume to go on from it, or choose another --out")
    images = load_images(options.data, size=options.size)
    if not len(images):
        raise ValueError(f"{options.data}: expected at least one image, got none")
    if not options.resume:
        torch.manual_seed(options.seed)
        sizes = {n.replace("-", "_"): v for n, v in VQVAE_SIZES.items()} | given
        model = MODELS[options.model.upper()](
            image_channels=images.shape[1], kmeans_init=True, threshold_ema_dead_code=1.0,
            variance=max(float(as_floats(images[:4096]).var()), 1e-6), **sizes,
        )  # type: ignore[arg-type]  # fmt: skip
    images = pad_to_multiple(images, model.factor)
    log = train_vqvae(
        model, images, steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate,
        seed=options.seed, checkpoint=options.out, save_every=options.save_every, resume=options.resume,
    )  # fmt: skip
    shown = as_floats(images[-GRID_IMAGES:])
    model.eval()
    with torch.no_grad():
        save_grid(grid, [shown, model(shown).reconstruction])
    used = ", ".join(f"{p:.1f}" for p in code_perplexities(model, images[-1024:]))
    held_out = f", held out {log.validation[-1][1]:.4f} of the variance" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.4f}{held_out}, perplexity of the codes {used}")
    print(f"{grid}: images above, reconstructions below")


def _train_pixels(options: argparse.Namespace) -> None:
    from fastgen.images import load_codes, load_images, load_labels
    from fastgen.training_pixels import MODELS, load_pixels, save_samples, train_pixels

    kind = MODELS[PIXEL_COMMANDS[options.model]]
    grid = _grid_beside(options)
    asked = {name: getattr(options, name) for name in ("channels", "layers", "levels", "codes", "distribution")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if options.resume:
        model, _ = load_pixels(options.out)
        different = [f"--{name} {value}" for name, value in asked.items() if model.config[name] != value]
        if type(model) is not kind:
            raise ValueError(f"{options.out}: is of a {type(model).__name__}, not of a {kind.__name__}")
        if bool(model.config["classes"]) != options.labels:
            wanted = "leave out --labels" if options.labels else "add --labels"
            raise ValueError(f"{options.out}: the model has {model.config['classes']} classes: {wanted}")
        if different:
            raise ValueError(f"{options.out}: is of another model: leave out {', '.join(different)}, or --resume")
    elif options.out.exists():  # said before any image is read
        raise FileExistsError(f"{options.out}: exists; add --resume to go on from it, or choose another --out")
    of_codes = model.codes if options.resume else options.codes
    if of_codes and options.data is None:
        raise ValueError("--codes: needs --data, an npz archive of integers (N, H, W)")
    images = load_codes(options.data) if of_codes else load_images(options.data, size=options.size)
    labels = load_labels(options.data) if options.labels else None
    if not len(images):
        raise ValueError(f"{options.data}: expected at least one image, got none")
    if not options.resume:
        torch.manual_seed(options.seed)
        if not of_codes:
            asked["image_channels"] = images.shape[1]
        if labels is not None:
            asked["classes"] = int(labels.max()) + 1
        model = kind(**PIXEL_SIZES[kind.__name__] | asked)
    log = train_pixels(
        model, images, labels=labels, steps=options.steps, batch_size=options.batch_size,
        learning_rate=options.learning_rate, seed=options.seed, checkpoint=options.out, save_every=options.save_every,
        resume=options.resume,
    )  # fmt: skip
    held_out = f", held out {log.validation[-1][1]:.4f}" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.4f} bits per value{held_out}")
    save_samples(
        grid, model, images[-GRID_IMAGES:], None if labels is None else labels[-GRID_IMAGES:], seed=options.seed
    )
    print(f"{grid}: samples; images, and their upper halves completed")


def _sample_pixels(options: argparse.Namespace) -> None:
    from fastgen.images import save_grid
    from fastgen.training_pixels import load_pixels, to_pixels

    model, size = load_pixels(options.checkpoint)
    if model.config["cond_codes"] or model.config["cond_channels"]:
        raise ValueError(f"{options.checkpoint}: the model is conditioned on a map; sample it from Python")
    if (options.label is None) == bool(model.config["classes"]):
        wanted = "needs --label" if model.config["classes"] else "has no classes: leave out --label"
        raise ValueError(f"{options.checkpoint}: the model {wanted}")
    labels = None if options.label is None else torch.full((options.number,), options.label)
    values = model.sample(
        options.number, tuple(options.image_size or size), labels=labels, temperature=options.temperature,
        dtype=DTYPES[options.dtype], generator=torch.Generator().manual_seed(options.seed), backend=options.backend,
        progress=True,
    )  # fmt: skip
    pictures = to_pixels(values, model)
    columns = math.ceil(math.sqrt(options.number))
    rows = -(-options.number // columns)
    blank = pictures.new_ones(rows * columns - options.number, *pictures.shape[1:])
    save_grid(options.out, list(torch.cat([pictures, blank]).split(columns)))
    print(f"{options.out}: {options.number} images of {values.shape[-2]} x {values.shape[-1]} pixels")


def _grid_beside(options: argparse.Namespace) -> Path:
    grid: Path = options.grid or options.out.with_suffix(".png")
    if grid.resolve() == options.out.resolve():
        raise ValueError(f"{options.out}: is where the pictures go; choose another --out or --grid")
    return grid


def _sample(options: argparse.Namespace) -> None:
    from fastgen.audio import check_output, mu_law_decode, save_audio
    from fastgen.training import load_wavenet

    check_output(options.out)  # before an hour's work
    model, rate = load_wavenet(options.checkpoint)
    samples = model.generate(
        round(options.seconds * rate), temperature=options.temperature, dtype=DTYPES[options.dtype],
        generator=torch.Generator().manual_seed(options.seed), backend=options.backend, progress=True,
    )  # fmt: skip
    x = mu_law_decode(samples[0], model.classes) if model.distribution == "categorical" else samples[0]
    save_audio(options.out, x, rate)
    print(f"{options.out}: {options.seconds:g} s at {rate} Hz")


def _bench(options: argparse.Namespace) -> int | None:
    from fastgen.bench import main as bench

    return bench(options.table)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a finite number of seconds > 0, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastgen", description=fastgen.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, parent: object = commands) -> argparse.ArgumentParser:
        added = parent.add_parser(name, help=text, description=text)  # type: ignore[attr-defined]
        added.set_defaults(run=run)
        return added  # type: ignore[no-any-return]

    def training(parser: argparse.ArgumentParser, options: dict[str, int]) -> None:
        for option, value in {**options, "save-every": 500, "seed": 0, "learning-rate": 1e-3}.items():
            parser.add_argument(f"--{option}", type=type(value), default=value, help="default: %(default)s")

    command("info", _info, "versions, the machine, and the live backends of every op")

    demo = command("demo", _demo, "train a small WaveNet on speech, a VQ-VAE and a Gated PixelCNN on digits, timed")
    demo.add_argument("--data", type=Path, metavar="FOLDER_OR_FILE", help="WAV or FLAC, instead of the speech included")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="default: %(default)s")
    demo.add_argument("--seconds", type=_seconds, default=60, help="of training, default: %(default)s")

    demo.add_argument("--only", choices=("wavenet", "vqvae", "pixels"), help="one part alone, default: all")

    train = commands.add_parser("train", help="train a model").add_subparsers(
        dest="model", required=True, metavar="MODEL"
    )
    wavenet = command("wavenet", _train, "train a WaveNet on WAV or FLAC files", train)
    wavenet.add_argument("--data", type=Path, required=True, metavar="FOLDER_OR_FILE")
    wavenet.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT")
    wavenet.add_argument("--steps", type=int, required=True, help="step to train up to")
    wavenet.add_argument("--resume", action="store_true", help="go on from the checkpoint; its model's sizes hold")
    wavenet.add_argument("--rate", type=int, help="of the model's audio in Hz, default: 16000")
    for size, default in SIZES.items():
        wavenet.add_argument(f"--{size}", type=type(default), help=f"default: {default}")
    training(wavenet, {"batch-size": 8, "segment": 4096})

    def on_images(name: str, run: object, text: str, grid: str) -> argparse.ArgumentParser:
        added = command(name, run, text, train)
        added.add_argument(
            "--data", type=Path, metavar="PATH",
            help="MNIST's IDX files, npz, or a folder of pictures; default: scikit-learn's digits",
        )  # fmt: skip
        added.add_argument("--size", type=int, help="side to crop and resize a folder's pictures to")
        added.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT")
        added.add_argument("--grid", type=Path, metavar="FILE.png", help=f"{grid}, default: beside --out")
        added.add_argument("--steps", type=int, required=True, help="step to train up to")
        added.add_argument("--resume", action="store_true", help="go on from the checkpoint; its model's sizes hold")
        return added

    for name, kind in PIXEL_COMMANDS.items():
        pixels = on_images(name, _train_pixels, f"train a {kind} on images or maps of codes", "samples")
        pixels.add_argument("--labels", action="store_true", help="condition on the labels that come with the data")
        pixels.add_argument("--levels", type=int, help="of a pixel, 2 (binarised anew each time) to 256; default: 2")
        pixels.add_argument("--codes", type=int, metavar="K", help="the data are maps of K codes, an npz of integers")
        pixels.add_argument("--distribution", choices=("bernoulli", "categorical", "logistic"))
        for size, value in PIXEL_SIZES[kind].items():
            pixels.add_argument(f"--{size}", type=int, help=f"default: {value}")
        training(pixels, {"batch-size": 32})

    for name, text in (("vqvae", "one map of codes"), ("vqvae2", "a top and a bottom map of codes")):
        vqvae = on_images(name, _train_vqvae, f"train a VQ-VAE with {text} on images", "reconstructions")
        for size, default in VQVAE_SIZES.items():
            vqvae.add_argument(f"--{size}", type=int, help=f"default: {default}")
        training(vqvae, {"batch-size": 64})

    sample = commands.add_parser("sample", help="sample from a checkpoint").add_subparsers(
        dest="model", required=True, metavar="MODEL"
    )
    wavenet = command("wavenet", _sample, "generate audio with a trained WaveNet", sample)
    wavenet.add_argument("checkpoint", type=Path)
    wavenet.add_argument("--seconds", type=_seconds, default=1.0, help="default: %(default)s")
    wavenet.add_argument("--out", type=Path, required=True, metavar="FILE.wav")
    pixels = command(
        "pixels", _sample_pixels, "draw images with a trained PixelCNN, GatedPixelCNN or PixelSNAIL", sample
    )
    pixels.add_argument("checkpoint", type=Path)
    pixels.add_argument("--number", type=_count, default=16, help="of images, default: %(default)s")
    pixels.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: that of the training images"
    )
    pixels.add_argument("--label", type=int, help="class of all images")
    pixels.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    for added in (wavenet, pixels):
        added.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        added.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
        added.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights, default: %(default)s")
        added.add_argument("--backend", choices=(*BACKENDS, "auto"), help="default: the fastest that is live")

    bench = command("bench", _bench, "run the benchmarks of a source checkout and write the README's tables")
    bench.add_argument(
        "--table", action="store_true", help="write the tables from the results that are there, run nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
