import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from select import select
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

import fastvlm_mlx
from fastvlm_mlx import backend, convert
from fastvlm_mlx.checkpoint.safetensors import TensorFile, read_header
from fastvlm_mlx.cli import app
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.inputs import images
from fastvlm_mlx.inputs.images import load_turned
from tests.checkpoints import APPLE, GOLDEN, changed
from tests.pictures import stored_with

DEMO = Path(fastvlm_mlx.__file__).parent / "demo_model"
PICTURE = str(APPLE / "images" / "square.png")


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FASTVLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "blas", lambda: backend.BLAS(name="fast"))  # or each answer comes with a note


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A converted checkpoint."""
    folder = tmp_path_factory.mktemp("cli") / "converted"
    result = invoke("convert", str(APPLE / "train"), str(folder), "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert f"wrote {folder}, 1.8" in result.stderr
    return str(folder)


class FakeRuntime:
    """Stands in for `load` and `stream_generate`; remembers what they were called with."""

    def __init__(self) -> None:
        self.pieces = ["A grey ", "squ", "are."]
        self.loaded: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    def load(self, name: str, **options: Any) -> tuple[str, str]:
        self.loaded = {"name": name, **options}
        return "model", "processor"

    def stream_generate(self, model: str, processor: str, **options: Any) -> Iterator[GenerationResult]:
        self.asked = options
        for count, text in enumerate(self.pieces, 1):
            last = count == len(self.pieces)
            yield GenerationResult(
                text=text,
                token_ids=(count,),
                prompt_tokens=30,
                visual_tokens=4,
                generated_tokens=count,
                finish_reason="stop" if last else None,
                timings=Timings(preprocess=0.1, ttft=0.5, decode=1.0, total=1.5),
            )


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(fastvlm_mlx, "load", fake.load)
    monkeypatch.setattr(fastvlm_mlx, "stream_generate", fake.stream_generate)
    monkeypatch.setattr(images, "load_turned", lambda source, **_: source)
    return fake


def test_the_answer_goes_to_stdout_and_nothing_else(runtime: FakeRuntime) -> None:
    result = invoke("generate", PICTURE)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "A grey square.\n", "")
    assert runtime.loaded["name"] == "apple/FastVLM-0.5B"
    assert runtime.asked["prompt"] == "Describe the image."
    assert runtime.asked["image"] == [PICTURE]


@pytest.fixture
def logo(tmp_path: Path) -> str:
    """A picture of black on transparent black."""
    image = Image.new("RGBA", (20, 10))
    image.paste((0, 0, 0, 255), (5, 2, 15, 8))
    image.save(tmp_path / "logo.png")
    return str(tmp_path / "logo.png")


def test_a_transparent_image_is_noted_in_one_line(runtime: FakeRuntime, logo: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(images, "load_turned", load_turned)
    result = invoke("generate", logo)
    assert (result.exit_code, result.stdout) == (0, "A grey square.\n")
    assert result.stderr == (
        f"{logo}: shows the colours stored in its transparent pixels; --background white shows white there\n"
    )
    assert np.asarray(runtime.asked["image"][0].stored).max() == 0


def test_a_background_shows_through_transparent_pixels(runtime: FakeRuntime, logo: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(images, "load_turned", load_turned)
    result = invoke("generate", logo, "--background", "#ff8000")
    assert (result.exit_code, result.stderr) == (0, "")
    image = runtime.asked["image"][0].stored
    assert (image.getpixel((0, 0)), image.getpixel((9, 5))) == ((255, 128, 0), (0, 0, 0))


def test_a_background_that_is_no_colour_is_wrong_usage(runtime: FakeRuntime, logo: str) -> None:
    result = invoke("generate", logo, "--background", "whit")
    assert result.exit_code == 2
    assert "--background" in result.stderr
    assert "background must be a colour such as white or #f0f0f0, not 'whit'" in result.stderr


def test_an_answer_that_ends_its_line_gets_no_second_newline(runtime: FakeRuntime) -> None:
    runtime.pieces = ["One.\n"]
    assert invoke("generate", PICTURE).stdout == "One.\n"


def test_every_option_reaches_the_runtime(runtime: FakeRuntime) -> None:
    result = invoke(
        *("generate", "a.png", "b.png", "-p", "What changed?", "-m", "folder", "--max-tokens", "7", "--temp", "0.7"),
        *("--top-p", "0.9", "--top-k", "40", "--min-p", "0.05", "--repetition-penalty", "1.1", "--seed", "3"),
        *("--system", "Be brief.", "--stop", "END", "--stop", "\n\n", "--resolution", "512", "--dtype", "float32"),
    )
    assert result.exit_code == 0
    assert runtime.loaded["name"] == "folder"
    assert runtime.loaded["dtype"] == "float32"
    assert runtime.loaded["lazy"] is True
    config = GenerationConfig(
        max_tokens=7,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        seed=3,
        stop=("END", "\n\n"),
    )
    assert runtime.asked == {
        "image": ["a.png", "b.png"],
        "prompt": "What changed?",
        "system": "Be brief.",
        "resolution": 512,
        "config": config,
        "schema": None,
        "free_tower": True,
    }


def test_options_come_from_the_environment(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_MODEL", "7b")
    monkeypatch.setenv("FASTVLM_RESOLUTION", "auto")
    monkeypatch.setenv("FASTVLM_MAX_TOKENS", "9")
    assert invoke("generate", PICTURE).exit_code == 0
    assert runtime.loaded["name"] == "7b"
    assert (runtime.asked["resolution"], runtime.asked["config"].max_tokens) == ("auto", 9)


def test_detail_goes_with_an_automatic_resolution(runtime: FakeRuntime) -> None:
    assert invoke("generate", PICTURE, "-r", "auto", "--detail", "12").exit_code == 0
    assert runtime.asked["resolution"] == "auto:12"
    assert invoke("generate", PICTURE, "-r", "auto:5").exit_code == 0
    assert runtime.asked["resolution"] == "auto:5"
    for arguments, message in (
        (("--detail", "12"), "goes with --resolution auto"),
        (("--detail", "12", "-r", "512"), "goes with --resolution auto"),
        (("--detail", "0", "-r", "auto"), "must be at least 1, not 0"),
        (("-r", "auto:x"), "a detail takes 1 to 64 pixels, as in auto:12, not 'x'"),
        (("-r", "autos"), "'autos' is neither a positive multiple of 64 nor 'auto'"),
    ):
        result = invoke("generate", PICTURE, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_json_is_one_object_with_the_whole_answer(runtime: FakeRuntime) -> None:
    runtime.pieces = ["Ein Fuß", ", 猫"]
    record = json.loads(invoke("generate", PICTURE, "--json").stdout)
    assert record["text"] == "Ein Fuß, 猫"
    assert record["token_ids"] == [1, 2]
    assert record["images"] == [PICTURE]
    assert record["finish_reason"] == "stop"
    assert (record["prompt_tokens"], record["visual_tokens"], record["generated_tokens"]) == (30, 4, 2)
    assert record["timings"]["ttft"] == 0.5
    assert record["tokens_per_second"] == 1.0
    assert record["peak_memory_bytes"] >= 0


def test_verbose_writes_statistics_to_stderr(runtime: FakeRuntime) -> None:
    result = invoke("generate", PICTURE, "--verbose")
    assert result.stdout == "A grey square.\n"
    assert "prompt: 30 tokens, 4 of them visual" in result.stderr
    assert "answer: 3 tokens, ended by stop" in result.stderr
    assert "ttft 0.500 s" in result.stderr
    assert "2.0 tokens/s" in result.stderr


def test_an_image_is_read_from_stdin(runtime: FakeRuntime) -> None:
    data = Path(PICTURE).read_bytes()
    record = json.loads(invoke("generate", "a.png", "-", "--json", stdin=data).stdout)
    assert runtime.asked["image"] == ["a.png", data]
    assert record["images"] == ["a.png", "<stdin>"]


def test_a_prompt_is_read_from_stdin(runtime: FakeRuntime) -> None:
    assert invoke("generate", PICTURE, "-p", "-", stdin="What is this, 猫?\n").exit_code == 0
    assert runtime.asked["prompt"] == "What is this, 猫?"


def test_a_prompt_from_stdin_loses_the_mark_that_windows_puts_before_it(runtime: FakeRuntime) -> None:
    assert invoke("generate", PICTURE, "-p", "-", stdin=b"\xef\xbb\xbfCount the shapes.\r\n").exit_code == 0
    assert runtime.asked["prompt"] == "Count the shapes."


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"caf\xe9", "stdin: byte 0xe9 at 3 is not UTF-8; the prompt has to be text in UTF-8"),
        ("Wie viele?".encode("utf-16"), "stdin: byte 0xff at 0 is not UTF-8"),
        (b"", "stdin was empty; pipe an image or a prompt into it"),
    ],
)
def test_a_prompt_from_stdin_has_to_be_text(runtime: FakeRuntime, stdin: bytes, message: str) -> None:
    result = invoke("generate", PICTURE, "-p", "-", stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {message}")
    assert not runtime.loaded


def test_a_question_in_the_place_of_an_image_is_told_where_it_belongs(tmp_path: Path) -> None:
    hint = "; if it is the question, put --prompt before it\n"
    for question in ("What is it?", "Why?", "Count the shapes"):
        result = invoke("generate", PICTURE, question, "-m", "demo")
        assert (result.exit_code, result.stderr) == (1, f"error: {question}: no such file{hint}")
    assert "--prompt" not in invoke("generate", "holiday.jpg", "-m", "demo").stderr
    assert "--prompt" not in invoke("generate", "my photo.jpg", "-p", "What is it?", "-m", "demo").stderr


@pytest.mark.parametrize(("tokens", "hint"), [("3", "--max-tokens allows more"), ("5", "the context is full")])
def test_an_answer_that_was_cut_says_so(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, tokens: str, hint: str
) -> None:
    def cut(*arguments: Any, **options: Any) -> Iterator[GenerationResult]:
        for piece in runtime.stream_generate(*arguments, **options):
            yield replace(piece, finish_reason="length" if piece.finish_reason else None)

    monkeypatch.setattr(fastvlm_mlx, "stream_generate", cut)
    result = invoke("generate", PICTURE, "-n", tokens)
    assert (result.stdout, result.stderr) == ("A grey square.\n", f"the answer was cut after 3 tokens; {hint}\n")
    assert invoke("generate", PICTURE, "-n", tokens, "--json").stderr == ""  # the record has it as finish_reason


def test_a_data_url_is_not_repeated_in_the_record(runtime: FakeRuntime) -> None:
    record = json.loads(invoke("generate", "data:image/png;base64," + "A" * 5000, "--json").stdout)
    assert record["images"] == ["data:image/png;base64,… (5000 characters)"]


def test_a_slow_blas_is_noted_once(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "device", lambda: "cpu")
    monkeypatch.setattr(backend, "blas", lambda: backend.BLAS(name="reference", hint="apt install something"))
    result = invoke("generate", PICTURE)
    note = "slow: MLX computes with its own BLAS, about 20 times slower than OpenBLAS; apt install something\n"
    assert (result.stdout, result.stderr) == ("A grey square.\n", note)
    monkeypatch.setattr(backend, "device", lambda: "gpu")
    assert invoke("generate", PICTURE).stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a BLAS is chosen on Linux only")
def test_a_blas_that_cannot_be_loaded_is_an_error() -> None:
    environment = {**os.environ, "FASTVLM_BLAS": "/nonexistent.so"}
    done = subprocess.run([*COMMAND, "info"], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: FASTVLM_BLAS=/nonexistent.so cannot be loaded (")
    assert done.stderr.count("\n") == 1


def test_a_prompt_without_images_is_plain_text(runtime: FakeRuntime) -> None:
    assert invoke("generate", "-p", "Hello").exit_code == 0
    assert runtime.asked["image"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give an image, or a question with --prompt"),
        (["generate", "-", "-"], "- can stand for one image or for the prompt, once"),
        (["generate", "-", "-p", "-"], "- can stand for one image or for the prompt, once"),
        (["generate", PICTURE, "--resolution", "100"], "'100' is neither a positive multiple of 64 nor 'auto'"),
        (["generate", PICTURE, "--resolution", "0"], "'0' is neither a positive multiple of 64 nor 'auto'"),
        (["generate", PICTURE, "--resolution", "-64"], "'-64' is neither a positive multiple of 64 nor 'auto'"),
        (["generate", PICTURE, "--max-tokens", "0"], "Invalid value for '--max-tokens'"),
        (["generate", PICTURE, "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["generate", PICTURE, "--temp", "-1"], "Invalid value for '--temp'"),
        (["generate", PICTURE, "--top-p", "1.5"], "Invalid value for '--top-p'"),
        (["generate", PICTURE, "--top-k", "-1"], "Invalid value for '--top-k'"),
        (["generate", PICTURE, "--min-p", "2"], "Invalid value for '--min-p'"),
        (["generate", PICTURE, "--seed", "-1"], "Invalid value for '--seed'"),
        (["generate", PICTURE, "--dtype", "int8"], "'int8' is not one of"),
        (["generate", PICTURE, "--modle", "x"], "No such option: --modle"),
        (["convert"], "SOURCE"),
        (["convert", "source"], "missing; give a folder to write, or --dry-run"),
        (["convert", "source", "out", "--dtype", "int4"], "'int4' is not one of"),
        (["genrate"], "Did you mean 'generate'?"),
        (["info", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_says_so_and_exits_2(runtime: FakeRuntime, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert not runtime.asked


def test_errors_are_one_line_and_exit_1(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImageError("cat.png: not an image")

    monkeypatch.setattr(fastvlm_mlx, "stream_generate", fail)
    result = invoke("generate", "cat.png")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: cat.png: not an image\n")
    assert isinstance(invoke("--debug", "generate", "cat.png").exception, ImageError)


def test_errors_of_the_operating_system_name_the_file(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "weights.safetensors")

    monkeypatch.setattr(fastvlm_mlx, "load", fail)
    result = invoke("generate", "cat.png")
    assert (result.exit_code, result.stderr) == (1, "error: No space left on device: weights.safetensors\n")


@pytest.mark.parametrize("image", ["landscape", "large", "portrait", "square", "tiny"])
def test_generate_answers_as_upstream_does(converted: str, image: str) -> None:
    expected = load_file(APPLE / "expected.safetensors")[f"{image}.greedy"]
    picture = str(APPLE / "images" / f"{image}.png")
    result = invoke("generate", picture, "--model", converted, "--max-tokens", "24", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    np.testing.assert_array_equal(record["token_ids"], expected[: len(record["token_ids"])])
    assert record["visual_tokens"] == 4


def test_a_photograph_is_turned_once(tmp_path: Path) -> None:
    upright = Image.open(DEMO / "sample-1.png").convert("RGB")
    assert upright.width != upright.height
    photo, answer = tmp_path / "photo.jpg", "A green triangle, a black cross and a green cross.\n"
    for orientation in range(1, 9):
        photo.write_bytes(stored_with(orientation, upright, "JPEG"))
        assert invoke("generate", "-m", "demo", str(photo)).stdout == answer, orientation
        if orientation == 6:  # a phone held upright
            assert invoke("generate", "-m", "demo", "-", stdin=photo.read_bytes()).stdout == answer


def test_an_unconverted_source_is_converted_once(converted: str) -> None:
    arguments = ("generate", PICTURE, "--model", str(APPLE / "reparam"), "--max-tokens", "4")
    first, second = invoke(*arguments), invoke(*arguments)
    assert "converting" in first.stderr
    assert "converting" not in second.stderr
    assert first.stdout == second.stdout


@pytest.mark.parametrize("model", ["apple/FastVLM-0.5B", str(APPLE / "reparam"), "demo"])
def test_a_mistyped_picture_costs_neither_a_download_nor_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    def begin(*_: Any, **__: Any) -> None:
        raise AssertionError("a download or a conversion has begun")

    monkeypatch.setattr(convert, "convert_checkpoint", begin)
    damaged, typo = tmp_path / "damaged.png", tmp_path / "typo.png"
    damaged.write_bytes(Path(PICTURE).read_bytes()[:100])
    for path, reason in ((typo, "no such file\n"), (tmp_path, "is a folder, not an image"), (damaged, "damaged")):
        result = invoke("generate", PICTURE, str(path), "-m", model)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {path}: {reason}")
    assert not (tmp_path / "cache").exists()


def no_numbers(folder: Path) -> None:
    """Writes NaN into a matrix that every answer needs, and changes nothing else."""
    file = TensorFile.whole(folder / "model.safetensors")
    tensor = next(t for t in read_header(file) if t.name == "language_model.model.layers.0.mlp.down_proj.weight")
    with file.path.open("r+b") as weights:
        weights.seek(tensor.start)
        weights.write(np.full(tensor.nbytes // 2, np.nan, np.float16).tobytes())


def half_a_tokenizer(folder: Path) -> None:
    """Damages the middle of a tokenizer, where only building it shows that."""
    with (folder / "tokenizer.json").open("r+b") as file:
        file.seek(2000)
        file.write(bytes(100))


@pytest.mark.parametrize("damage", [no_numbers, half_a_tokenizer])
def test_damage_in_the_cache_that_only_a_question_shows_is_made_good_once(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    arguments = ("generate", PICTURE, "--model", str(APPLE / "reparam"), "--max-tokens", "4")
    answer = invoke(*arguments).stdout
    (folder,) = (tmp_path / "cache").glob("reparam-*")
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    damage(folder)
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (0, answer)
    assert f"; converting {APPLE / 'reparam'} again\n" in result.stderr
    assert "converting" not in invoke(*arguments).stderr
    damage(own)  # a folder of the user's own is never written to
    before = {path: path.stat().st_mtime_ns for path in own.iterdir()}
    result = invoke("generate", PICTURE, "--model", str(own), "--max-tokens", "4")
    assert result.exit_code == 1
    assert "converting" not in result.stderr
    assert {path: path.stat().st_mtime_ns for path in own.iterdir()} == before


def test_an_unknown_model_is_an_error_that_lists_what_there_is() -> None:
    result = invoke("generate", PICTURE, "--model", "nonsense")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: nonsense: no such folder or .zip")
    assert "0.5b, 1.5b, 7b" in result.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = invoke("convert", str(APPLE / "train"), str(tmp_path / "out"), "--dry-run")
    assert result.exit_code == 0
    assert "train-time branches" in result.stdout
    assert "head.proj (49,152 bytes)" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_convert_does_not_touch_an_existing_destination(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    result = invoke("convert", str(APPLE / "train"), str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path}: exists already; remove it or choose another destination\n"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_info_describes_the_machine_and_the_cache() -> None:
    invoke("generate", PICTURE, "--model", str(APPLE / "train"), "--max-tokens", "1")
    record = json.loads(invoke("info", "--json").stdout)
    assert record["device"] in ("cpu", "gpu")
    assert record["cores"] >= 1
    assert record["memory"] > 1e9
    assert [name.split("-")[0] for name in record["cached"]] == ["train"]
    assert record["answers_bytes"] == 0
    text = invoke("info").stdout
    assert f"fastvlm-mlx  {fastvlm_mlx.__version__}, mlx " in text
    assert "BLAS" in text


def test_info_counts_parameters_bytes_and_tokens(converted: str) -> None:
    record = json.loads(invoke("info", converted, "--json").stdout)
    assert record["source"]["layout"] == "apple-train"
    assert record["dtype"] == "float32"
    assert record["parts"]["mm_projector"] == {
        "parameters": 256 * 64 + 64 + 64 * 64 + 64,
        "size_bytes": 4 * (256 * 64 + 64 + 64 * 64 + 64),
        "bits_per_weight": 32.0,
    }
    tokens = {int(side): needs["visual_tokens"] for side, needs in record["resolutions"].items()}
    assert list(tokens.items()) == [(128, 4), (256, 16), (512, 64), (768, 144), (1024, 256), (1536, 576)]
    text = invoke("info", converted).stdout
    assert "apple-train" in text
    assert "128 px" in text


def test_info_counts_a_quantized_layer_as_the_weights_it_stands_for() -> None:
    record = json.loads(invoke("info", str(GOLDEN / "mlx_vlm" / "q8"), "--json").stdout)
    plain = json.loads(invoke("info", str(APPLE / "train"), "--json").stdout)
    for part in ("vision_tower", "mm_projector", "language_model"):
        assert record["parts"][part]["parameters"] == plain["parts"][part]["parameters"]


def test_info_says_from_how_few_to_how_many_bits_layers_have(tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert.convert_checkpoint(GOLDEN / "mlx_vlm" / "q4", source)
    assert "\nquantization  4 bits, groups of 32, affine\n" in invoke("info", str(source)).stdout
    entry = {"group_size": 32, "bits": 4, "mode": "affine"}
    entries = {**entry, "language_model.model.embed_tokens": {**entry, "bits": 8}, "mm_projector.2": entry}
    mixed = changed(source, tmp_path / "mixed", config={"quantization": entries})
    assert "\nquantization  4 to 8 bits by layer, groups of 32, affine\n" in invoke("info", str(mixed)).stdout


def test_the_version_is_printed() -> None:
    assert invoke("--version").stdout == f"fastvlm-mlx {fastvlm_mlx.__version__}\n"


def test_without_a_command_the_help_is_shown() -> None:
    assert "generate  Answer a question about images." in invoke("--help").stdout
    assert "Commands:" in invoke().output


def test_nothing_is_coloured_when_piped(converted: str) -> None:
    for arguments in (["--help"], ["generate", PICTURE, "-m", converted, "-v"], ["generate"], ["info", converted]):
        assert "\x1b" not in invoke(*arguments).output


COMMAND = [sys.executable, "-c", "from fastvlm_mlx.cli import main; main()"]


def test_an_interrupt_exits_130_without_a_traceback() -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(
        [*COMMAND, "generate", "-"], stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        os.write(writing, b"x")
        while select([reading], [], [], 0)[0]:  # until it reads
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""
    os.close(reading)
    os.close(writing)


def test_a_reader_that_leaves_is_no_error(converted: str) -> None:
    arguments = [*COMMAND, "generate", PICTURE, "-m", converted, "-n", "100"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_an_unforeseen_error_shows_no_traceback_unless_asked() -> None:
    code = "import fastvlm_mlx; fastvlm_mlx.load = None; from fastvlm_mlx.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", PICTURE]
    quiet = subprocess.run(command, capture_output=True, text=True, check=False)
    assert quiet.returncode == 1
    assert (
        quiet.stderr
        == "error: TypeError: 'NoneType' object is not callable (unexpected; FASTVLM_DEBUG=1 shows where)\n"
    )
    loud = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "FASTVLM_DEBUG": "1"}
    )
    assert "Traceback" in loud.stderr


def test_choices_are_listed_with_the_most_probable_first() -> None:
    sample = str(DEMO / "sample-1.png")
    asked = ("generate", sample, "-m", "demo", "-p", "Is there a cross?", "--choice", "no", "--choice", "yes")
    lines = invoke(*asked).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["choice", "yes", "no"]
    assert lines[1].split()[1:] == ["100.0%", "99.8%"]
    record = json.loads(invoke(*asked, "--json").stdout)
    assert [choice["text"] for choice in record["choices"]] == ["yes", "no"]
    assert set(record["choices"][0]) == {"text", "probability", "corrected", "logprob", "tokens"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--choice", "yes"), "at least two choices"),
        (("--choice", "yes", "--choice", "yes"), "yes is given twice"),
        (("--choice", "yes", "--choice", "no", "--temp", "1"), "--temp: would change nothing with --choice"),
        (("--choice", "yes", "--choice", "no", "-n", "5"), "--max-tokens: would change nothing with --choice"),
    ],
)
def test_choices_that_mean_nothing_are_wrong_usage(options: tuple[str, ...], message: str) -> None:
    result = invoke("generate", PICTURE, "-m", "demo", *options)
    assert result.exit_code == 2
    assert message in result.stderr
