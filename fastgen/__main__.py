"""python -m fastgen info | demo | train | sample | evaluate | bench"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen.backend import BACKENDS, BackendError
from fastgen.commands_flows import FLOW_COMMANDS, FLOW_SIZES, sample_flow, train_flow_command
from fastgen.commands_images import (
    PIXEL_COMMANDS,
    PIXEL_SIZES,
    VQVAE_SIZES,
    check_new,
    loop_options,
    sample_pixels,
    sample_two_stage,
    train_pixels_command,
    train_prior_command,
    train_vqvae_command,
)
from fastgen.commands_speech import SPEECH_SIZES, sample_speech, train_speech_command
from fastgen.commands_vectors import VECTOR_COMMANDS, VECTOR_SIZES, sample_vectors, train_vectors_command
from fastgen.densities import DENSITIES
from fastgen.files import check_writable
from fastgen.loop import PRECISIONS, SCHEDULES

USER_ERRORS = (ValueError, TypeError, ImportError, OSError, BackendError, FloatingPointError, OverflowError)
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {
    "layers": 20, "cycles": 2, "residual-channels": 64, "skip-channels": 128, "kernel-size": 2,
    "distribution": "categorical", "classes": 256, "mixtures": 10,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> exit status: 0, 2 for a user's error, 130 after Ctrl-C."""
    try:
        options = _parser().parse_args(arguments)
    except ValueError as error:  # of a file of arguments
        print(f"fastgen: arguments that cannot be read: {error}", file=sys.stderr)
        return 2
    try:
        return options.run(options) or 0
    except USER_ERRORS as error:
        message = str(error).split("\nException raised from ")[0]  # PyTorch's come with a trace of C++
        print(f"fastgen {options.command}: {message}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        print(f"fastgen {options.command}: not enough memory for what was asked", file=sys.stderr)
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
        check_new(options)
        rate = 16000 if options.rate is None else options.rate
        torch.manual_seed(options.seed)
        model = fastgen.models.WaveNet(**{n.replace("-", "_"): v for n, v in SIZES.items()} | given)  # type: ignore[arg-type]
    clips = load_folder(options.data, rate, exclude=options.exclude)
    log = train_wavenet(model.to(options.device), clips, rate, **loop_options(options), segment=options.segment)
    held_out = f", held out {log.validation[-1][1]:.3f}" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.3f} bits per sample{held_out}")


def _sample(options: argparse.Namespace) -> None:
    from fastgen.audio import check_output, mu_law_decode, save_audio
    from fastgen.training import load_wavenet

    check_output(options.out)  # before an hour's work
    model, rate = load_wavenet(options.checkpoint)
    samples = model.to(options.device).generate(
        round(options.seconds * rate), temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        dtype=DTYPES[options.dtype], generator=torch.Generator().manual_seed(options.seed), backend=options.backend,
        progress=True,
    ).cpu()  # fmt: skip
    x = mu_law_decode(samples[0], model.classes) if model.distribution == "categorical" else samples[0]
    save_audio(options.out, x, rate)
    print(f"{options.out}: {options.seconds:g} s at {rate} Hz")


def _evaluate(options: argparse.Namespace) -> None:
    from fastgen.evaluate import evaluate, record, recorded

    if options.record:  # before the work
        check_writable(options.record)
        recorded(options.record)
    figures = evaluate(
        options.checkpoint, options.data, size=options.size, number=options.number, samples=options.samples,
        include=options.include, device=options.device,
    )  # fmt: skip
    for figure in figures:
        print(f"{figure.name}: {figure.value:.4f} {figure.unit}, {figure.examples} examples")
    if options.record:
        record(options.record, options.name or options.checkpoint.stem, options.checkpoint, figures)
        print(f"{options.record}: recorded")


def _bench(options: argparse.Namespace) -> int | None:
    from fastgen.bench import main as bench

    return bench(options.table, options.only)


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


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected an integer in [0, 2^63), got {text!r}")
    return int(text)


def _holdout(text: str) -> float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of examples, or a share, got {text!r}") from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        float(torch.zeros((), device=device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected a device that torch has here, got {text!r}: {reason}") from None
    return device


class _Parser(argparse.ArgumentParser):
    """Takes options from files as well, `@FILE`: a line holds some, what follows a # is a comment."""

    def __init__(self, **options: Any) -> None:
        super().__init__(fromfile_prefix_chars="@", **options)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastgen", description=fastgen.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, parent: object = commands) -> argparse.ArgumentParser:
        added = parent.add_parser(name, help=text, description=text)  # type: ignore[attr-defined]
        added.set_defaults(run=run)
        return added  # type: ignore[no-any-return]

    def on_device(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:1; default: %(default)s")

    def training(parser: argparse.ArgumentParser, options: dict[str, int], holdout: float = 0.05) -> None:
        on_device(parser)
        parser.add_argument(
            "--precision",
            choices=PRECISIONS,
            default=PRECISIONS[0],
            help="of products, by autocast; default: %(default)s",
        )
        parser.add_argument("--schedule", choices=SCHEDULES, default="constant", help="of the learning rate")
        parser.add_argument(
            "--holdout", type=_holdout, default=holdout, help="share, or number, to validate on; default: %(default)s"
        )
        for option, value in {**options, "save-every": 500, "seed": 0, "learning-rate": 1e-3}.items():
            kind = _seed if option == "seed" else type(value)
            parser.add_argument(f"--{option}", type=kind, default=value, help="default: %(default)s")

    command("info", _info, "versions, the machine, and the live backends of every op")

    demo = command("demo", _demo, "small models, trained in a minute: speech, digits, points in the plane; and timed")
    demo.add_argument("--data", type=Path, metavar="FOLDER_OR_FILE", help="WAV or FLAC, instead of the speech included")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="default: %(default)s")
    demo.add_argument("--seconds", type=_seconds, default=60, help="of training, default: %(default)s")
    demo.add_argument("--only", choices=("wavenet", "vqvae", "pixels", "flows"), help="one part alone, default: all")

    train = commands.add_parser("train", help="train a model").add_subparsers(
        dest="model", required=True, metavar="MODEL"
    )

    def trained(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = command(name, run, text, train)
        added.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT")
        added.add_argument("--steps", type=int, required=True, help="step to train up to")
        added.add_argument("--resume", action="store_true", help="go on from the checkpoint; its model's sizes hold")
        return added

    def sizes(parser: argparse.ArgumentParser, defaults: Mapping[str, object]) -> None:
        for size, default in defaults.items():
            parser.add_argument(f"--{size.replace('_', '-')}", type=type(default), help=f"default: {default}")

    def on_audio(name: str, run: object, text: str, rate: int) -> argparse.ArgumentParser:
        added = trained(name, run, text)
        added.add_argument("--data", type=Path, required=True, metavar="FOLDER_OR_FILE", help="WAV or FLAC files")
        added.add_argument("--exclude", metavar="PATTERN", help="of names of files to leave out, such as '*_[0-4].wav'")
        added.add_argument("--rate", type=int, help=f"of the model's audio in Hz, default: {rate}")
        return added

    def on_images(
        name: str, run: object, text: str, grid: str, default: str = "scikit-learn's digits"
    ) -> argparse.ArgumentParser:
        added = trained(name, run, text)
        added.add_argument(
            "--data", type=Path, metavar="PATH",
            help=f"MNIST's IDX files, npz, or a folder of pictures; default: {default}",
        )  # fmt: skip
        added.add_argument("--size", type=int, help="side to crop and resize a folder's pictures to")
        added.add_argument("--grid", type=Path, metavar="FILE.png", help=f"{grid}, default: beside --out")
        return added

    wavenet = on_audio("wavenet", _train, "train a WaveNet on WAV or FLAC files", 16000)
    sizes(wavenet, SIZES)
    training(wavenet, {"batch-size": 8, "segment": 4096}, 0.1)

    for name, kind in PIXEL_COMMANDS.items():
        pixels = on_images(name, train_pixels_command, f"train a {kind} on images or maps of codes", "samples")
        pixels.add_argument("--labels", action="store_true", help="condition on the labels that come with the data")
        pixels.add_argument(
            "--codes", type=int, metavar="K", required=kind == "GPTPrior",
            help="the data are maps of K codes, an npz of integers",
        )  # fmt: skip
        if kind != "GPTPrior":
            pixels.add_argument(
                "--levels", type=int, help="of a pixel, 2 (binarised anew each time) to 256; default: 2"
            )
            pixels.add_argument("--distribution", choices=("bernoulli", "categorical", "logistic"))
        if kind == "PixelRNN":
            pixels.add_argument("--kind", choices=("row", "diagonal"), help="of its LSTMs, default: diagonal")
        sizes(pixels, PIXEL_SIZES[kind])
        training(pixels, {"batch-size": 32})

    for name, kind in VECTOR_COMMANDS.items():
        vectors = on_images(name, train_vectors_command, f"train a {kind} on binarised images", "samples")
        sizes(vectors, VECTOR_SIZES[kind])
        if kind == "VAE":
            vectors.add_argument("--convolutions", action="store_true", help="in place of perceptrons")
        training(vectors, {"batch-size": 100})

    def of_priors(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--priors", nargs="+", choices=("gated_pixelcnn", "pixelsnail", "gpt"),
            help="one for each map of codes, the top first; default: gated_pixelcnn, or pixelsnail twice",
        )  # fmt: skip
        parser.add_argument("--prior-steps", type=_count, help="of each prior, default: --steps")
        parser.add_argument("--prior-channels", type=int, help="default: the model's")
        parser.add_argument("--prior-layers", type=int, help="default: the model's")
        parser.add_argument("--class-labels", action="store_true", help="condition the priors on the data's labels")

    for name, text in (("vqvae", "one map of codes"), ("vqvae2", "a top and a bottom map of codes")):
        vqvae = on_images(name, train_vqvae_command, f"train a VQ-VAE with {text} on images", "reconstructions")
        vqvae.add_argument("--then", choices=("prior",), help="train priors over the codes too, and draw images")
        of_priors(vqvae)
        sizes(vqvae, VQVAE_SIZES)
        training(vqvae, {"batch-size": 64})

    speech = on_audio("speech_vqvae", train_speech_command, "train a VQ-VAE of speech, with a WaveNet as decoder", 8000)
    speech.add_argument("--then", choices=("prior",), help="train a prior over the codes too, and generate audio")
    speech.add_argument("--length", type=int, help="samples to which clips are filled up or cut, default: 8192")
    sizes(speech, SPEECH_SIZES)
    of_priors(speech)
    training(speech, {"batch-size": 8, "segment": 2048})

    prior = command("prior", train_prior_command, "train the priors over a VQ-VAE's codes, and draw from them", train)
    prior.add_argument("--of", type=Path, required=True, metavar="CHECKPOINT", help="of the VQ-VAE")
    prior.add_argument("--data", type=Path, metavar="PATH", help="what it was trained on")
    prior.add_argument("--exclude", metavar="PATTERN", help="of names of audio files to leave out")
    prior.add_argument("--size", type=int, help="side to crop and resize a folder's pictures to")
    prior.add_argument("--steps", type=int, required=True, help="step to train up to")
    prior.add_argument("--resume", action="store_true", help="go on from priors that are there")
    prior.set_defaults(out=None)
    of_priors(prior)
    training(prior, {"batch-size": 64})

    for name, model in FLOW_COMMANDS.items():
        flow = on_images(name, train_flow_command, f"train a {model} on images or points", "samples", "two moons")
        flow.add_argument(
            "--density", choices=DENSITIES, help="of points in the plane, in place of --data; default: two_moons"
        )
        flow.add_argument("--labels", action="store_true", help="condition on the labels that come with the data")
        flow.add_argument("--levels", type=int, help="of a pixel, 2 to 256; default: 256")
        flow.add_argument("--reversible", action="store_true", help="memory that does not grow with the depth")
        for size, text in FLOW_SIZES[model].items():
            flow.add_argument(f"--{size}", type=int, help=text)
        training(flow, {"batch-size": 64})

    sample = commands.add_parser("sample", help="sample from a checkpoint").add_subparsers(
        dest="model", required=True, metavar="MODEL"
    )

    def drawn(
        name: str, run: object, text: str, out: str = "FILE.png", number: int = 16, label: str = ""
    ) -> argparse.ArgumentParser:
        added = command(name, run, text, sample)
        added.add_argument("checkpoint", type=Path)
        added.add_argument("--out", type=Path, required=True, metavar=out)
        added.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
        on_device(added)
        added.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
        if number:
            added.add_argument("--number", type=_count, default=number, help="to draw, default: %(default)s")
        if label:
            added.add_argument("--label", type=int, help=label)
        return added

    of_all = "class of all that is drawn, where the model has classes"
    wavenet = drawn("wavenet", _sample, "generate audio with a trained WaveNet", "FILE.wav", number=0)
    wavenet.add_argument("--seconds", type=_seconds, default=1.0, help="default: %(default)s")
    pixels = drawn("pixels", sample_pixels, "draw images with a trained PixelCNN or one of its kin", label=of_all)
    pixels.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: that of the training images"
    )
    drawn("flow", sample_flow, "draw images or points with a trained RealNVP or Glow", label=of_all)
    drawn("vectors", sample_vectors, "draw images with a trained FVSBN, NADE or VAE")
    images = "draw images with a trained VQ-VAE and the priors beside it"
    vqvae = drawn("vqvae", sample_two_stage, images, label=of_all)
    speech = drawn(
        "speech_vqvae", sample_speech, "generate audio, clip after clip, with a VQ-VAE of speech and its prior",
        "FILE.wav", 3, f"{of_all}; default: each in turn",
    )  # fmt: skip
    for added in (wavenet, pixels, vqvae, speech):
        of_codes = "" if added in (wavenet, pixels) else ", of codes"
        added.add_argument(
            "--top-k", type=_count, help=f"draw from so many of the most probable values alone{of_codes}"
        )
        added.add_argument(
            "--top-p", type=float, help=f"draw from the fewest values that have so much of the probability{of_codes}"
        )
    for added in (wavenet, pixels, vqvae):
        added.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights, default: %(default)s")
        added.add_argument("--backend", choices=(*BACKENDS, "auto"), help="default: the fastest that is live")

    evaluate = command("evaluate", _evaluate, "the figure of a trained model on data that it has not seen")
    evaluate.add_argument("checkpoint", type=Path)
    on_device(evaluate)
    evaluate.add_argument(
        "--data", type=Path, metavar="PATH", help="as for training; of MNIST and archives, the part to test on is read"
    )
    evaluate.add_argument("--size", type=int, help="side to crop and resize a folder's pictures to")
    evaluate.add_argument("--include", metavar="PATTERN", help="of names of audio files, such as '*_[0-4].wav'")
    evaluate.add_argument("--number", type=_count, help="of the first examples, default: all")
    evaluate.add_argument("--samples", type=int, default=0, help="of a VAE's importance-weighted likelihood")
    evaluate.add_argument("--record", type=Path, metavar="FILE.json", help="to put the figures in, too")
    evaluate.add_argument("--name", help="of the entry in it, default: the checkpoint's")

    bench = command("bench", _bench, "run the benchmarks of a source checkout and write its tables and plots")
    bench.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="files of bench/ to run, without bench_ and .py"
    )
    bench.add_argument(
        "--table", action="store_true", help="write the tables from the results that are there, run nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
