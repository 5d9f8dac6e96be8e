"""Films, PDFs, the screen and the clipboard, wherever a command line names pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fastvlm_mlx import backend
from fastvlm_mlx.cli import app
from tests import displays, films, pdfs


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def generate(*arguments: str, stdin: str | bytes | None = None) -> dict[str, Any]:
    """The answer of the demo model, as JSON, and what was noted."""
    result = invoke("generate", *arguments, "--model", "demo", "--no-warm", "-n", "4", "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return {**answer, "stderr": result.stderr}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests share, in which the demo model is converted once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FASTVLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTVLM_CACHE", str(cache))
    monkeypatch.setattr(backend, "blas", lambda: backend.BLAS(name="fast"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def film(tmp_path: Path) -> str:
    pytest.importorskip("av", reason="the extra video is not installed")
    films.write(tmp_path / "film.mp4", [i / 10 for i in range(20)])
    return "film.mp4"


@pytest.fixture
def paper(tmp_path: Path) -> str:
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    (tmp_path / "paper.pdf").write_bytes(pdfs.pdf([(1, 0, 0), (0, 1, 0), (0, 0, 1)]))
    return "paper.pdf"


def test_generate_asks_about_frames_and_names_them(film: str) -> None:
    answer = generate(film)
    assert answer["images"] == ["film.mp4#t=0.242", "film.mp4#t=0.728", "film.mp4#t=1.212", "film.mp4#t=1.698"]
    assert answer["visual_tokens"] == 4 * 9
    assert answer["stderr"].startswith("film.mp4: 4 frames of 1.94 s; --frames or #t=1.5 takes others\n")


def test_generate_asks_about_as_many_frames_as_requested(film: str) -> None:
    answer = generate(film, "--frames", "2")
    assert (answer["visual_tokens"], "frames" in answer["stderr"]) == (2 * 9, False)


def test_generate_asks_about_pages(paper: str) -> None:
    answer = generate(f"{paper}#2-3")
    assert (answer["images"], answer["visual_tokens"]) == (["paper.pdf#2", "paper.pdf#3"], 2 * 9)


def test_generate_reads_a_pdf_from_stdin(paper: str) -> None:
    piped = generate("-", stdin=Path(paper).read_bytes())
    assert (piped["images"], piped["visual_tokens"]) == (["<stdin>#1"], 9)


@pytest.mark.usefixtures("film")
def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    result = invoke("generate", "film.mp4", "--model", "demo", "--no-warm")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: film.mp4: reading films and cameras needs av; install it with: pip install 'fastvlm-mlx[video]'\n"
    )


def test_a_picture_needs_no_module_of_other_sources(tmp_path: Path) -> None:
    """What a plain picture takes is not made slower by what else there is."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import sys; from fastvlm_mlx.cli import app\n"
        "try: app(['generate', 'a.png', '--model', 'demo', '--no-warm', '-n', '1'])\n"
        "except SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('av', 'pypdfium2', 'mss')\n"
        "    or name.startswith('fastvlm_mlx.inputs.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "'fastvlm_mlx.inputs.named'" in loaded
    for name in ("views", "bundles", "video", "decoding", "pdf", "animation", "screen", "clipboard", "cameras"):
        assert f"fastvlm_mlx.inputs.{name}'" not in loaded
    assert not [name for name in ("av", "pypdfium2", "mss") if f"'{name}'" in loaded]


def test_the_screen_and_the_clipboard_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := displays.missing():
        pytest.skip(reason)
    pytest.importorskip("mss", reason="the extra screen is not installed")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "copied.png")
    with displays.display() as name:
        monkeypatch.setenv("DISPLAY", name)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        displays.copy("image/png", (tmp_path / "copied.png").read_bytes())
        answer = generate("@screen", "@clipboard")
    assert (answer["images"], answer["visual_tokens"]) == (["@screen", "@clipboard"], 2 * 9)


def caption(*arguments: str, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    """The records of the demo model, and what was noted."""
    result = invoke("caption", *arguments, "--model", "demo", "--no-warm", "-n", "4")
    assert result.exit_code == code, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


def test_caption_keys_each_answer_by_its_time_or_page(film: str, paper: str) -> None:
    records, _ = caption(film, paper, "--every", "500ms")
    assert [record["file"] for record in records] == [
        *("film.mp4#t=0", "film.mp4#t=0.5", "film.mp4#t=1", "film.mp4#t=1.5"),
        *("paper.pdf#1", "paper.pdf#2", "paper.pdf#3"),
    ]
    assert [record.get("time", record.get("page")) for record in records] == [0, 0.5, 1, 1.5, 1, 2, 3]


def test_caption_goes_on_with_the_parts_that_have_no_line(film: str, tmp_path: Path) -> None:
    caption(f"{film}#t=0,1", "--every", "500ms", "-o", "out.jsonl")
    _, noted = caption(film, "--every", "500ms", "-o", "out.jsonl")
    assert "4 pictures, 2 done, 2 to do" in noted
    written = [json.loads(line)["file"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == ["film.mp4#t=0", "film.mp4#t=0.5", "film.mp4#t=1", "film.mp4#t=1.5"]


@pytest.mark.usefixtures("film", "paper")
def test_films_and_pdfs_of_a_folder_are_left_out_unless_requested(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    records, noted = caption(".")
    assert [record["file"] for record in records] == ["a.png"]
    assert "1 skipped (a film, without --frames or --every), 1 skipped (a PDF, without --pages)" in noted
    records, _ = caption(".", "--frames", "1", "--pages", "2")
    assert [record["file"] for record in records] == ["a.png", "film.mp4#t=0.97", "paper.pdf#2"]


def test_nothing_is_written_beside_a_part(film: str, tmp_path: Path) -> None:
    _, noted = caption(film, "--frames", "1", "--txt", "--xmp", "--embed", "--hf")
    assert "not written: of the parts of a film or PDF" in noted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4"]


def test_what_cannot_be_read_of_several_files_is_named_and_the_others_are_captioned(film: str, tmp_path: Path) -> None:
    (tmp_path / "bad.pdf").write_bytes(pdfs.locked())
    records, noted = caption(f"{film}#t=1", f"{film}#9", "bad.pdf", code=3)
    assert [record["file"] for record in records] == ["film.mp4#t=1"]
    assert "bad.pdf: the PDF has a password; save a copy without it\n" in noted
    assert "film.mp4#9: it has moments, not pages; name one as #t=12.5" in noted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "0"], "'0' is not a time such as 2s, 500ms or 1m"),
        (["--every", "nan"], "'nan' is not a time such as 2s, 500ms or 1m"),
        (["--pages", "3-1"], "'3-1' is not like 2, 1-3 or all"),
        (["--frames", "2", "--every", "2s"], "cannot be with --frames"),
    ],
)
def test_wrong_parts_are_a_usage_error(arguments: list[str], message: str) -> None:
    result = invoke("caption", "a.mp4", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_chat_shows_frames_and_pages_and_keeps_them_in_the_session(film: str, paper: str, tmp_path: Path) -> None:
    lines = f"/image {paper}#2\nWhat is it?\n{film}#t=1 And this?\n/save talk.json\n"
    result = invoke("chat", "--model", "demo", "--no-warm", "--json", "-n", "4", stdin=lines)
    assert result.exit_code == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["images"] for answer in answers] == [["paper.pdf#2"], ["film.mp4#t=1"]]
    assert "picture: paper.pdf#2, 1448×2048" in result.stderr
    assert (tmp_path / "talk.json").read_text().count("data:image/png;base64,") == 2


def test_a_conversation_that_is_loaded_opens_no_device(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "@screen"}}]},
        {"role": "assistant", "content": "A desk."},
    ]
    (tmp_path / "talk.json").write_text(json.dumps({"messages": turns}))
    result = invoke("chat", "--model", "demo", "--no-warm", stdin="/load talk.json\n")
    assert "@screen: no such file" in result.stderr


def test_a_question_is_about_a_bounded_number_of_pictures(film: str) -> None:
    result = invoke("generate", film, "--frames", "65", "--model", "demo", "--no-warm")
    assert result.exit_code == 1
    assert result.stderr == "error: film.mp4: 65 pictures are more than 64, the most of one question\n"


def test_the_film_of_a_live_photo_is_no_film_of_its_own(film: str, tmp_path: Path) -> None:
    (tmp_path / film).rename(tmp_path / "IMG_1.MOV")
    Image.new("RGB", (8, 8)).save(tmp_path / "IMG_1.JPG")
    records, _ = caption("IMG_1.JPG", "IMG_1.MOV", "--frames", "2")
    assert [record["file"] for record in records] == ["IMG_1.JPG"]
