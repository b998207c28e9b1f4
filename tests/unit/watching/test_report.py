"""The report: one file that holds everything, true to the log, whatever state the folder is in."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.images import to_pil
from muse_maskgit_pytorch.watching.report import (
    _log_ticks,
    _ticks,
    read_curves,
    read_metrics,
    write_report,
)
from muse_maskgit_pytorch.watching.run_file import RunFile

Tag = tuple[str, dict[str, str]]


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[Tag] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.tags if t == tag and kind in ["", *a.get("class", "").split()]]


def log(folder: Path, lines: list[dict], stage: str = "vae", end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps({"stage": stage, **line}) for line in lines)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text + end)
    return folder


def sheet(folder: Path, step: int, colour: str = "red", stage: str = "vae") -> Image.Image:
    image = Image.new("RGB", (40, 20), colour)
    image.putpixel((3, 4), (1, 2, 3))
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    image.save(folder / "samples" / f"{stage}-{step:08d}.png")
    return image


def pictures(page: Page) -> list[Image.Image]:
    data = [a["src"].partition("base64,")[2] for a in page.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(d))) for d in data]


LINE = dict(step=50, loss=0.5, psnr=12.0, codebook_usage=0.25, lr=1e-4, steps_per_s=2.0)


# The page ----------------------------------------------------------------------------------------


def test_one_line_of_a_log_is_enough(tmp_path: Path):
    path = write_report(log(tmp_path / "run", [LINE]))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    for words in ("vae", "steps 50", "25 s", "No warnings", "codes in use 25 %", "Learning rate"):
        assert words in re.sub(r"(?<=[a-z])(?=\d)", " ", page.text), words
    assert len(page.all("figure", "chart")) == 5  # psnr, loss, usage, lr, speed


def test_the_page_needs_nothing_beside_itself(tmp_path: Path):
    sheet(log(tmp_path, [LINE]), 50)
    page = Page(write_report(tmp_path))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(a["src"].startswith("data:image/png;base64,") for a in page.all("img"))
    assert len(page.all("img")) == 1
    for outside in ("http:", "https:", "url(", "@import", str(tmp_path.parent)):
        assert outside not in page.source


@pytest.mark.parametrize(
    "end", ['\n{"stage": "vae", "st', "\n\x00\x00\x00", "\n[1, 2]\n", "\nnull"]
)
def test_a_damaged_last_line_is_passed_over(tmp_path: Path, end: str):
    log(tmp_path / "whole", [LINE, LINE | dict(step=100)])
    log(tmp_path / "killed", [LINE, LINE | dict(step=100)], end=end)
    whole, killed = (read_metrics(tmp_path / name) for name in ("whole", "killed"))
    assert killed == whole
    assert killed["vae"].step == 100
    write_report(tmp_path / "killed")


def test_after_a_resume_the_later_lines_count(tmp_path: Path):
    values = [(10, 1.0), (20, 2.0), (30, 3.0), (20, 7.0)]
    log(tmp_path, [dict(step=step, loss=value, psnr=None) for step, value in values])
    assert read_curves(tmp_path, "vae") == {"loss": [(10, 1.0), (20, 7.0)]}
    assert read_curves(tmp_path, "base") == read_curves(tmp_path / "nowhere", "vae") == {}


def test_stages_stand_one_after_the_other_or_alone(tmp_path: Path):
    log(tmp_path, [LINE])
    log(tmp_path, [dict(step=70, loss=6.5, critic=0.6, valid_loss=6.6)], stage="base")
    sheet(tmp_path, 50)
    sheet(tmp_path, 70, stage="base")
    titles = re.findall("<h1>(.*?)</h1>", write_report(tmp_path).read_text(encoding="utf-8"))
    assert titles == ["vae", "base"]
    alone = Page(write_report(tmp_path, "base", out=tmp_path / "new" / "base.html"))
    assert "<h1>vae" not in alone.source
    assert "Critic" in alone.text  # a curve that no group knows has a chart of its own
    assert len(alone.all("img")) == 1
    with pytest.raises(ValueError, match=r"stage 'superres' .* it has \['base', 'vae'\]"):
        write_report(tmp_path, "superres")


def test_without_a_log(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl: give the results_folder"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "v')
    with pytest.raises(ValueError, match="not one line"):
        write_report(tmp_path)
    assert read_curves(tmp_path, "vae") == {}  # a run may be resumed all the same
    assert not (tmp_path / "report.html").exists()


def test_warnings_are_shown_as_text(tmp_path: Path):
    warning = dict(step=900, warning="12 % <b>: a < b & c; do $that")
    log(tmp_path, [LINE, warning, warning])  # a resumed run said it again
    page = Page(write_report(tmp_path))
    assert page.text.count("12 % <b>: a < b & c; do $that") == 1
    assert "Health: 1 warning" in page.text
    assert "step 900" in page.text
    assert "No warnings" not in page.text


def test_many_warnings_are_cut_to_the_latest(tmp_path: Path):
    log(tmp_path, [LINE, *(dict(step=s, warning=f"trouble {s}: x") for s in range(30))])
    text = Page(write_report(tmp_path)).text
    assert "Health: 30 warnings" in text
    assert "10 earlier ones" in text
    assert "trouble 29" in text
    assert "trouble 9:" not in text


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch):
    log(tmp_path, [LINE])
    (tmp_path / "report.html").write_text("old")

    def full(self, *args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_levels_stand_across_the_loss_alone(tmp_path: Path):
    levels = dict(reference_uniform=9.0, reference_unigram=7.5, reference_bigram=6.25)
    shares = {f"valid_nats_{share}": 5.0 + share / 100 for share in (25, 50, 75, 100)}
    shares |= {f"valid_accuracy_{share}": 0.5 for share in (25, 50, 75, 100)}
    pace = dict(images_per_s=321.0, hours_left=2.5, gemm_share=0.42, data_wait=0.1)
    lines = [dict(step=0, **levels), LINE | pace, dict(step=50, **shares)]
    page = Page(write_report(log(tmp_path, lines, stage="base")))
    for words in ("untrained (ln V): 9", "frequency of codes: 7.5", "and of neighbours: 6.25"):
        assert page.source.count(words) == 1  # not across the accuracy
    text = re.sub(r"(?<=[a-z])(?=\d)", " ", page.text)
    for words in ("images per second 321", "time left 2 h 30 min", "machine's products 42%"):
        assert words in text, words
    assert "Reference" not in text  # no charts of their own


def test_prompts_have_a_section_of_their_own(tmp_path: Path):
    log(tmp_path, [LINE], stage="base")
    sheet(tmp_path, 50, stage="base")
    shown = sheet(tmp_path, 50, "rgb(9,8,7)", stage="base-prompts")
    page = Page(write_report(tmp_path))
    assert page.text.index("Prompts") > page.text.index("Pictures")
    assert len(page.all("img")) == 2
    assert ImageChops.difference(pictures(page)[1], shown).getbbox() is None


# Pictures ----------------------------------------------------------------------------------------


def test_the_last_picture_and_six_from_all_over_the_run(tmp_path: Path):
    log(tmp_path, [LINE | dict(step=2000)])
    shown = {
        step: sheet(tmp_path, step, f"rgb({step // 10},0,9)") for step in range(100, 2001, 100)
    }
    sheet(tmp_path, 100, stage="vae-other")
    page = Page(write_report(tmp_path))
    assert len(page.all("img")) == 7
    last, *earlier = pictures(page)
    assert ImageChops.difference(last, shown[2000]).getbbox() is None
    assert ImageChops.difference(earlier[0], shown[100]).getbbox() is None
    assert ImageChops.difference(earlier[-1], shown[1900]).getbbox() is None
    steps = [int(image.getchannel("R").histogram().index(799)) * 10 for image in earlier]
    gaps = [b - a for a, b in pairwise(steps)]
    assert set(gaps) <= {300, 400}


def test_a_picture_cut_off_by_a_kill_is_passed_over(tmp_path: Path):
    log(tmp_path, [LINE])
    good = sheet(tmp_path, 50)
    data = (tmp_path / "samples" / "vae-00000050.png").read_bytes()
    for step in (20, 80):
        (tmp_path / "samples" / f"vae-{step:08d}.png").write_bytes(data[:60])
    (image,) = pictures(Page(write_report(tmp_path)))
    assert ImageChops.difference(image, good).getbbox() is None


def test_large_pictures_are_made_smaller(tmp_path: Path):
    log(tmp_path, [LINE])
    (tmp_path / "samples").mkdir()
    noise = to_pil(torch.rand(3, 510, 1700))[0]  # 2.6 MB as PNG
    for step in range(8):
        noise.save(tmp_path / "samples" / f"vae-{step:08d}.png", compress_level=1)
    path = write_report(tmp_path)
    assert path.stat().st_size < 4_500_000
    last, *earlier = pictures(Page(path))
    assert len(earlier) == 6
    assert last.width >= 400
    assert last.width / last.height == pytest.approx(1700 / 510, rel=0.02)


# Charts ------------------------------------------------------------------------------------------


def chart(path: Path, title: str) -> str:
    source = path.read_text(encoding="utf-8")
    return source.partition(f"<h3>{title}</h3>")[2].partition("</figure>")[0]


def heights(part: str) -> dict[str, float]:
    """Height of every labelled line of a chart's grid."""
    rows = re.findall(r"class=grid d='M\d+ ([\d.]+)H\d+'/><text [^>]*class=y>([^<]*)<", part)
    return {label: float(y) for y, label in rows}


def test_points_lie_where_the_axis_says(tmp_path: Path):
    log(tmp_path, [dict(step=s, recon=v) for s, v in ((100, 1.0), (200, 2.0), (400, 4.0))])
    part = chart(write_report(tmp_path), "Terms of reconstruction")
    grid = heights(part)
    points = [tuple(map(float, p)) for p in re.findall(r"cx=([\d.]+) cy=([\d.]+)", part)]
    assert [y for _, y in points] == [grid["1"], grid["2"], grid["4"]]
    assert grid["1"] > grid["2"] > grid["4"]  # downwards, as SVG counts
    (x1, _), (x2, _), (x4, _) = points
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)
    assert "log scale" not in part


def test_a_large_range_has_a_log_axis(tmp_path: Path):
    values = [10.0, 1.0, 0.1, 0.01]
    log(tmp_path, [dict(step=i + 1, grad_norm=v, generator=-v) for i, v in enumerate(values)])
    path = write_report(tmp_path)
    part = chart(path, "Gradient norms")
    grid = heights(part)
    drawn = [float(y) for y in re.findall(r" cy=([\d.]+)", part)]
    assert "log scale" in part
    assert drawn == [grid[label] for label in ("10", "1", "0.1", "0.01")]
    steps = [b - a for a, b in pairwise(drawn)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.11)
    assert "log scale" not in chart(path, "Terms of the adversary")  # of negative numbers: none


def test_training_and_validation_share_a_chart_and_long_curves_are_thinned(tmp_path: Path):
    values = (20 + torch.randn(5000)).tolist()
    lines = [dict(step=i + 1, psnr=v) for i, v in enumerate(values)]
    log(tmp_path, [*lines, dict(step=5000, valid_psnr=21.5)])
    path = write_report(tmp_path)
    part = chart(path, "Reconstruction")
    raw, line, _ = re.findall("points='([^']*)'", part)
    assert len(raw.split()) <= 600
    assert len(line.split()) <= 300
    assert "validation <b>21.5</b>" in part

    def spread(points: str) -> float:
        ys = [float(point.split(",")[1]) for point in points.split()]
        return max(ys) - min(ys)

    assert spread(line) < 0.3 * spread(raw)  # the noise is faint, the course is strong


def test_marks_stand_at_what_happened(tmp_path: Path):
    lines = [dict(step=s, loss=1.0, skipped_steps=0, restarts=0) for s in range(10, 110, 10)]
    for line in lines:
        line["gan_weight"] = 0.1 * (line["step"] >= 50)
        line["generator"] = 0.3
        line["skipped_steps"] = (line["step"] >= 70) + (line["step"] >= 90)
        line["restarts"] = int(line["step"] >= 90)
    path = write_report(log(tmp_path, lines))
    marks = re.findall(r"class='mark (\w+)' .*?<title>step (\d+):", chart(path, "Loss"))
    assert marks == [("start", "50"), ("skip", "70"), ("skip", "90"), ("restart", "90")]
    text = Page(path).text
    assert "the adversary starts" in text
    assert "steps skipped2" in text

    calm = write_report(log(tmp_path / "calm", [dict(step=10, loss=1.0, restarts=0)]))
    assert "mark" not in chart(calm, "Loss")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (13.1, 27.9, [10, 15, 20, 25, 30]),
        (-0.3, 0.02, [-0.3, -0.2, -0.1, 0, 0.1]),
        (0, 19_950, [0, 5000, 10_000, 15_000, 20_000]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float, ticks: list[float]):
    assert _ticks(low, high) == pytest.approx(ticks, abs=1e-12)


def test_ticks_of_a_log_axis():
    assert _log_ticks(0.0008, 12) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])
    assert _log_ticks(0.15, 4) == pytest.approx([0.2, 0.5, 1, 2])
    assert len(_log_ticks(1e-20, 1)) <= 8


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-12, 1e30, -1e30])
def test_any_constant_can_be_drawn(tmp_path: Path, value: float):
    log(tmp_path, [{"step": s, **dict.fromkeys(("loss", "psnr", "lr"), value)} for s in (1, 2)])
    log(tmp_path, [dict(step=0, loss=value)], stage="step zero")
    assert "nan" not in "".join(re.findall("<svg.*?</svg>", write_report(tmp_path).read_text()))


def test_the_page_says_how_the_run_was_made(tmp_path: Path):
    log(tmp_path, [LINE])
    assert "How it was made" not in write_report(tmp_path).read_text()
    made = {
        "stage": "vae",
        "settings": {"lr": 0.0003, "betas": [0.9, 0.96]},
        "data": {"source": "image folder '<b>cats</b>'", "fingerprint": "0123456789abcdef"},
        "model": {"config": {"vae": {"dim": 64}}},
    }
    RunFile(tmp_path, "vae").write(made, 0, {})
    RunFile(tmp_path, "vae").write({**made, "settings": {"lr": 0.1}}, 9, json.loads(
        (tmp_path / "vae-run.json").read_text()
    ))  # fmt: skip
    page = write_report(tmp_path).read_text()
    rows = ["<th>config.vae.dim<td>64", "<th>lr<td>0.1", "<th>changed.lr<td>[0.0003, 0.1]"]
    for row in (*rows, "image folder &#x27;&lt;b&gt;cats", "0123456789abcdef", "Sitting 2"):
        assert row in page, row


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"settings": 3, "sittings": [3]}'])
def test_a_damaged_description_costs_no_page(tmp_path: Path, text: str):
    log(tmp_path, [LINE])
    (tmp_path / "vae-run.json").write_text(text)
    assert "<svg" in write_report(tmp_path).read_text()


# The command -------------------------------------------------------------------------------------


def test_the_command_prints_the_path(tmp_path: Path, capsys):
    log(tmp_path, [LINE])
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    main(["report", str(tmp_path), "--stage", "vae", "--out", str(tmp_path / "a" / "b.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'b.html'}\n"
    assert Page(tmp_path / "a" / "b.html").all("svg")
