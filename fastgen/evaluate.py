"""The figure of a trained model on data that it has not seen."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.audio import audio_files, load_folder, mu_law_encode
from fastgen.checkpoints import load_checkpoint, read_checkpoint
from fastgen.checks import check_integer, check_weights
from fastgen.files import whole_file
from fastgen.images import load_codes, load_images, load_labels, pad_to_multiple
from fastgen.loop import device_of
from fastgen.models import FVSBN, NADE, VAE, VQVAE, VQVAE2, FlowModel, PixelModel, SpeechVQVAE, WaveNet

BATCH = 100  # examples in one forward
PIECE = 8192  # samples of audio in one forward
SEED = 0  # of binarisation, dequantisation and latent values
IMPORTANCE_BATCH, IMPORTANCE_CHUNK = 25, 50  # images at once, and samples of z for each


class Figure(NamedTuple):
    """One figure, a mean over examples."""

    name: str
    value: float
    unit: str
    examples: int


def evaluate(
    path: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    *,
    size: int | None = None,
    number: int | None = None,
    samples: int = 0,
    include: str | None = None,
    device: str | torch.device = "cpu",
) -> list[Figure]:
    """The test figures of a checkpoint.

    Images are binarised, dequantised and coded the same way each time. Audio is read in pieces of 8192 samples at most,
    each file from silence.

    Parameters
    ----------
    path
        Of any of the trainings of this package.
    data, size
        As in `fastgen.images.load_images`: the part "test" of data that have parts; for audio a file or folder.
    number
        Of the examples, the first ones; all by default.
    samples
        Of an importance-weighted likelihood beside a VAE's bound; 0 for none.
    include
        Pattern of the names of audio files in a folder, such as "*_[0-4].wav"; all by default.
    device
        To compute on.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If a file is missing or holds something else, or the data do not fit the model.
    """
    check_integer("evaluate", "samples", samples, 0)
    if number is not None:
        check_integer("evaluate", "number", number)
    model, content = load_model(path)
    check_weights(os.fspath(path), model)
    if samples and not isinstance(model, VAE):
        raise ValueError(f"evaluate: samples are of a VAE's likelihood, {os.fspath(path)} is a {type(model).__name__}")
    model.to(device).eval()
    if isinstance(model, WaveNet | SpeechVQVAE):
        if data is None:
            raise ValueError("evaluate: data is needed, a file or folder of audio")
        clips = load_folder(data, content["rate"], include=include)[:number]
        if isinstance(model, WaveNet):
            return [_audio(model, clips)]
        return _speech(path, model, clips, content["length"], audio_files(data, include=include))
    if include is not None:
        raise ValueError(f"evaluate: include is of audio files, {os.fspath(path)} is a {type(model).__name__}")
    if isinstance(model, FlowModel) and len(model.shape) == 1:
        return [_density(model, content.get("source"), data is not None or size is not None, number)]
    labels = None
    if isinstance(model, PixelModel) and model.codes:
        if data is None:
            raise ValueError("evaluate: data is needed, an npz archive of codes")
        images = load_codes(data)[:number]
    else:
        images = load_images(data, size=size, part="test")[:number]
    if not len(images):
        raise ValueError(f"evaluate: {data} must hold at least one image, got none")
    if isinstance(model, PixelModel) and (model.config["cond_codes"] or model.config["cond_channels"]):
        raise ValueError(
            f"evaluate: {os.fspath(path)} is conditioned on a map; a prior is evaluated with its quantizer, by the "
            "quantizer's checkpoint"
        )
    if isinstance(model, PixelModel | FlowModel) and model.config["classes"]:
        labels = load_labels(data, part="test")[:number]
    if isinstance(model, PixelModel):
        return _pixels(model, images, labels)
    if isinstance(model, FlowModel):
        return [_flow(model, pad_to_multiple(images, 2 ** model.config["scales"]), labels)]
    if isinstance(model, VQVAE | VQVAE2):
        images = pad_to_multiple(images, model.factor)
        return [*_vqvae(model, images), *_codes(path, model, images, lambda _: load_labels(data, part="test")[:number])]
    assert isinstance(model, FVSBN | NADE | VAE)
    return _vectors(model, images, samples)


def load_model(path: str | os.PathLike[str]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a checkpoint of any training, on the CPU, and the checkpoint's content."""
    from fastgen import training_flows, training_images, training_pixels, training_speech, training_vectors
    from fastgen.training import load_wavenet

    content = read_checkpoint(path, ("config", "state_dict"), "fastgen")
    if "model" not in content:
        return load_wavenet(path)[0], content
    models: dict[str, type[torch.nn.Module]] = {}
    for training in (training_flows, training_images, training_pixels, training_vectors, training_speech):
        models.update(training.MODELS)
    return load_checkpoint(path, models, "fastgen")


def _mean(model: torch.nn.Module, log_p: Callable[..., Tensor], *examples: Tensor | None) -> float:
    """Of -log_p over examples, which are given batch by batch, where the model is."""
    first = examples[0]
    assert first is not None
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(first), BATCH):
            part = [None if rows is None else rows[i : i + BATCH].to(device_of(model)) for rows in examples]
            total -= float(log_p(*part).double().sum())
    return total / len(first)


def _vectors(model: FVSBN | NADE | VAE, images: Tensor, samples: int) -> list[Figure]:
    from fastgen.training_vectors import binarised

    generator = torch.Generator().manual_seed(SEED)
    x = binarised(images, generator)
    if not isinstance(model, VAE):
        return [Figure("-log p(x)", _mean(model, model.log_prob, x), "nats", len(x))]
    noise = torch.randn(len(x), model.latent, generator=generator)
    figures = [Figure("-ELBO", _mean(model, lambda x, e: model.elbo(x, noise=e), x, noise), "nats", len(x))]
    if samples:
        total = 0.0
        for part in x.split(IMPORTANCE_BATCH):
            x_part = part.to(device_of(model))
            log_p = model.importance_log_prob(x_part, samples, chunk=IMPORTANCE_CHUNK, generator=generator)
            total -= float(log_p.double().sum())
        figures.append(Figure(f"-log p(x), {samples} importance samples", total / len(x), "nats", len(x)))
    return figures


def _pixels(model: PixelModel, images: Tensor, labels: Tensor | None) -> list[Figure]:
    from fastgen.training_pixels import check_data, to_levels

    check_data("evaluate", model, images)
    x = to_levels(images, model, torch.Generator().manual_seed(SEED))
    nats = _mean(model, model.log_prob, x, labels)
    if model.levels == 2:
        return [Figure("-log p(x)", nats, "nats", len(x))]
    return [Figure("-log p(x)", nats / (math.log(2) * x[0].numel()), "bits/dim", len(x))]


def _flow(model: FlowModel, images: Tensor, labels: Tensor | None) -> Figure:
    from fastgen.training_flows import check_data, to_levels

    check_data("evaluate", model, images, labels)
    generator = torch.Generator().manual_seed(SEED)
    x = to_levels(images, model)
    nats = _mean(model, lambda x, labels: model.log_prob(x, labels, generator=generator), x, labels)
    return Figure("-log p(x)", nats / (math.log(2) * model.dims), "bits/dim", len(x))


def _density(model: FlowModel, source: str | None, given: bool, number: int | None) -> Figure:
    """On points drawn anew from the density that a flow was trained on."""
    from fastgen.densities import DENSITIES, POINTS, draw, points_of

    name, seed = points_of(source)
    if name not in DENSITIES or given:
        what = "leave out data and size" if name in DENSITIES else f"its checkpoint names none, but {source!r}"
        raise ValueError(f"evaluate: a flow of points is evaluated on those of the density it learned: {what}")
    points = draw(name, number or POINTS, torch.Generator().manual_seed(seed + 1))  # other ones than in training
    return Figure("-log p(x)", _mean(model, model.log_prob, points), "nats", len(points))


def _vqvae(model: VQVAE | VQVAE2, images: Tensor) -> list[Figure]:
    from fastgen.training_images import as_floats, check_images, code_perplexities

    check_images("evaluate", model, images)

    def minus_error(part: Tensor) -> Tensor:
        x = as_floats(part)
        error: Tensor = (x - model(x).reconstruction).square().flatten(1).mean(1)
        return -error

    figures = [Figure("mean squared error", _mean(model, minus_error, images), "of pixels in [0, 1]", len(images))]
    for i, perplexity in enumerate(code_perplexities(model, images)):
        figures.append(Figure(f"perplexity of the codes, level {i}", perplexity, "codes", len(images)))
    return figures


def _codes(
    path: str | os.PathLike[str],
    model: VQVAE | VQVAE2 | SpeechVQVAE,
    data: Tensor,
    labels: Callable[[int], Tensor | None],
) -> list[Figure]:  # fmt: skip
    """What the priors beside a quantizer pay for the codes of data; one of classes needs the labels that `labels`
    finds for so many."""
    from fastgen.training_stages import LEVELS, beside, encode, load_priors

    levels = LEVELS[type(model).__name__]
    if not all(beside(path, level).is_file() for level in levels):
        return []
    figures, codes = [], encode(model, data)
    for i, (level, prior) in enumerate(zip(levels, load_priors(path)[1], strict=True)):
        prior.to(device_of(model)).eval()
        of_classes = labels(prior.config["classes"]) if prior.config["classes"] else None
        if prior.config["classes"] and of_classes is None:
            continue
        nats = _mean(prior, prior.log_prob, codes[i], of_classes, codes[i - 1] if i else None)
        figures.append(Figure(f"-log2 p(codes), {level}", nats / math.log(2), "bits/example", len(data)))
    return figures


def _audio(model: WaveNet, clips: Sequence[Tensor]) -> Figure:
    if model.local_channels or model.speakers:
        raise ValueError("evaluate: takes WaveNets without conditioning; got local_channels or speakers > 0")
    nats, total = 0.0, 0
    with torch.no_grad():
        for clip in clips:
            x = mu_law_encode(clip, model.classes) if model.distribution == "categorical" else clip
            for piece in x.split(PIECE):
                nats -= float(model.log_prob(piece[None].to(device_of(model))))
            total += len(x)
    return Figure("-log2 p(x)", nats / (math.log(2) * total), "bits/sample", len(clips))


def _speech(
    path: str | os.PathLike[str], model: SpeechVQVAE, clips: Sequence[Tensor], length: int, files: Sequence[Path]
) -> list[Figure]:
    from fastgen.training_speech import clips_of, labels_of

    x = clips_of(clips, length - length % model.downsample, model.classes)
    bits = _mean(model, lambda part: model(part)[0], x) / (math.log(2) * x.shape[1])
    figures = [Figure("-log2 p(x | codes)", bits, "bits/sample", len(x))]

    def labels(classes: int) -> Tensor | None:
        found = labels_of(files)  # numbered as in training where the same words are there
        return found[: len(x)] if int(found.max()) + 1 == classes else None

    return figures + _codes(path, model, x, labels)


def recorded(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `record` has put into a file; nothing where there is none.

    Raises
    ------
    ValueError
        For a file that holds something else.
    """
    try:
        entries = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: expected JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{os.fspath(path)}: expected a JSON object of figures, got a {type(entries).__name__}")
    return entries


def record(
    path: str | os.PathLike[str], name: str, checkpoint: str | os.PathLike[str], figures: Sequence[Figure]
) -> None:
    """Put the figures under `name` into a JSON file, with what made them, in place of what stood there."""
    content = read_checkpoint(checkpoint, ("step",), "fastgen")
    path, entries = Path(path), recorded(path)
    entries[name] = {
        "model": content.get("model", "WaveNet"),
        "steps": content["step"],
        "seconds": round(content.get("seconds", 0)),
        "threads": content.get("threads"),
        "machine": content.get("machine"),
        "validation": content.get("validation", []),
        "unit": content.get("unit", ""),  # of those
        "figures": [figure._asdict() for figure in figures],
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
