"""`muse eval vae`: the table, the files, and mistakes in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.evaluate import table
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.data import ImageFolder
from muse_maskgit_pytorch.evaluation import Metric, evaluate_tokenizer
from muse_maskgit_pytorch.images import image_grid


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Nine images of 20 x 24 pixels and a tokenizer of factor 4."""
    root = tmp_path_factory.mktemp("eval")
    (root / "images").mkdir()
    for number, image in enumerate(tiny.images(9, 24)):
        pixels = (image[:, :20] * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    tiny.vae().save(root / "vae.safetensors")
    return root


def command(root: Path, **changes: object) -> list[str]:
    options = dict(vae=root / "vae.safetensors", folder=root / "images", image_size=16)
    return ["eval", "vae", *(f"--{key}={value}" for key, value in {**options, **changes}.items())]


def test_table_file_and_sheet(root: Path, tmp_path: Path, resnet: str, capsys):
    out, picture = tmp_path / "deep" / "result.json", tmp_path / "sheet.png"
    assert main(command(root, features=resnet, batch_size=4, out=out, picture=picture)) == 0
    result = json.loads(out.read_text())
    assert result["folder"] == str(root / "images")
    assert result["image_size"] == 16
    assert result["features"] == resnet
    found = result["metrics"]

    dataset, vae = ImageFolder(root / "images", 16), tiny.vae()
    vae.load(root / "vae.safetensors")
    wanted = evaluate_tokenizer(vae, dataset)
    assert found.keys() > {"rfid", "perceptual", *wanted} - {"rfid"}
    for name, metric in wanted.items():
        assert found[name]["images"] == 9
        if not name.endswith("_per_s"):
            assert found[name]["value"] == pytest.approx(metric.value, rel=1e-5, abs=1e-6)

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["metric", *found]
    psnr = lines[1 + list(found).index("psnr")]
    assert psnr.split()[1:3] == [f"{found['psnr']['value']:.5g}", "9"]
    assert found["psnr"]["note"] in psnr

    images = torch.stack([dataset[row]["image"] for row in range(8)])
    recon = vae.decode_from_ids(vae.encode_to_ids(images))
    sheet = image_grid(torch.cat([images, recon]), columns=8)
    assert np.array_equal(np.array(Image.open(picture)), np.array(sheet))
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["result.json", "sheet.png"]  # and no temporary ones


def test_a_limit_and_no_features(root: Path, tmp_path: Path, capsys):
    picture = tmp_path / "sheet.png"
    assert main(command(root, features="none", limit=3, picture=picture)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[2] for line in lines[1:]} == {"3"}
    assert not any(line.startswith(("rfid", "perceptual")) for line in lines)
    assert Image.open(picture).width == 3 * 16 + 4 * 2


def test_the_tokenizer_of_a_shipped_models_stage(root: Path, tmp_path: Path, capsys):
    out = tmp_path / "result.json"
    command_line = command(root, vae="scenes:base", features="none", limit=2, out=out)
    assert main(command_line) == 0
    bits = json.loads(out.read_text())["metrics"]["bits_per_pixel"]
    assert bits["value"] == pytest.approx(12 / 64)  # 4,096 codes, 8 x 8 pixels each
    capsys.readouterr()
    assert "base or :superres" in fails(command(root, vae="scenes"), capsys)


def test_the_columns_of_the_table_stand_below_each_other():
    figures = {"psnr": Metric(27.5, 9, "dB"), "long_name": Metric(0.12345678, 100, "")}
    assert table(figures).splitlines() == [
        "metric       value  images",
        "psnr          27.5       9  dB",
        "long_name  0.12346     100",
    ]


def fails(argv: list[str], capsys) -> str:
    """Run; check that it fails as a mistake in the input; return its one sentence."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("muse: error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(folder="absent"), "'absent' does not exist"),
        (dict(image_size=18), "18 is not a positive multiple of the tokenizer's factor 4"),
        (dict(vae="absent.safetensors"), "absent.safetensors"),
        (dict(features="nobody/nothing"), "--features none"),
        (dict(features="nobody/nothing"), "'nobody/nothing' cannot be had"),
        (dict(features="none", limit=0), "limit must be at least 1"),
        (dict(features="none", batch_size=-1), "batch_size must be at least 1"),
        (dict(features="none", out="a.txt"), "must end in .json"),
        (dict(features="none", picture="a.jpg"), "must end in .png"),
        (dict(device="abc"), "--device 'abc'"),
        (dict(feature="none"), "did you mean --features?"),
    ],
)
def test_bad_input(root: Path, changes, says, capsys):
    assert says in fails(command(root, **changes), capsys)


def test_what_is_missing_is_named(capsys):
    assert "vae" in fails(["eval", "vae"], capsys)
    assert "did you mean 'eval vae'?" in fails(["eval", "vea"], capsys)


def test_a_group_alone_shows_its_commands(capsys):
    assert main(["eval"]) == 0
    assert "muse eval vae" in capsys.readouterr().out
