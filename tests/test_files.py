"""Files that are written whole, places where none can be, and pictures that would replace something else."""

import contextlib
import os

import numpy as np
import pytest
import torch

from fastgen.__main__ import main
from fastgen.files import check_picture, check_writable, whole_file
from fastgen.images import load_codes, load_images, save_grid


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("first")
    with contextlib.suppress(KeyError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["a.txt"]


def test_places_where_nothing_can_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    check_writable(tmp_path / "a" / "b" / "c.pt")
    assert not (tmp_path / "a").exists()
    with pytest.raises(IsADirectoryError, match="expected a file to write to, got a folder"):
        check_writable(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"file.x\.pt: cannot be written, .*file is a file, not a folder"):
        check_writable(file / "x.pt")


def test_pictures_replace_pictures_alone(tmp_path):
    picture = tmp_path / "a.png"
    save_grid(picture, [torch.rand(2, 1, 4, 4)])
    check_picture(picture)
    with pytest.raises(ValueError, match=r"a\.pdf: is where a picture goes; expected a name that ends in \.png"):
        check_picture(tmp_path / "a.pdf")
    picture.write_bytes(b"not a picture")
    with pytest.raises(FileExistsError, match="exists and is no PNG"):
        check_picture(picture)


def test_commands_spare_what_is_there(tmp_path, capsys):
    out, data = tmp_path / "a.pt", tmp_path / "data.npz"
    np.savez(data, train=np.zeros((30, 4, 4), np.uint8))
    train = ["train", "nade", "--hidden", "4", "--steps", "1", "--data", str(data)]
    assert main([*train, "--out", str(out), "--grid", str(data)]) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err
    assert main([*train, "--out", str(data / "x.pt")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert not out.exists()
    assert main([*train, "--out", str(out)]) == 0
    before = out.read_bytes()
    assert main(["sample", "vectors", str(out), "--out", str(out)]) == 2
    assert out.read_bytes() == before
    assert main(["sample", "pixels", str(out), "--out", str(data)]) == 2
    assert load_images(data).shape == (30, 1, 4, 4)


def test_gray_pictures_of_sixteen_bits(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    values = np.array([[0, 128, 257], [32768, 65535, 300]], np.uint16)
    (tmp_path / "deep").mkdir()
    image.fromarray(values).save(tmp_path / "deep" / "a.png")
    assert load_images(tmp_path / "deep").tolist() == [[[[0, 0, 1], [128, 255, 1]]]]
    (tmp_path / "float").mkdir()
    image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float" / "a.tiff")
    with pytest.raises(ValueError, match="holds floating point pixels; expected 8 or 16 bits"):
        load_images(tmp_path / "float")


def test_codes_that_no_int64_holds(tmp_path):
    np.savez(tmp_path / "c.npz", codes=np.full((1, 2, 2), 1 << 63, np.uint64))
    with pytest.raises(ValueError, match=r"codes must be below 2\^63"):
        load_codes(tmp_path / "c.npz")
