"""Captions of many pictures, and the journal with which a later run continues."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx import Engine, FastVLM, FastVLMProcessor, GenerationConfig, generate
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.inputs import images, processor
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.inputs.tokenizer import StreamingDetokenizer
from fastvlm_mlx.inputs.turned import TurnedImage
from fastvlm_mlx.jobs.asking import Asking, Record
from fastvlm_mlx.jobs.caption import CaptionJob
from fastvlm_mlx.jobs.captions import remove_opening
from fastvlm_mlx.jobs.journal import Journal
from fastvlm_mlx.jobs.pictures import Picture, find_pictures
from fastvlm_mlx.jobs.shards import Names, Shard
from fastvlm_mlx.jobs.task import Task
from tests.checkpoints import APPLE

TASK = Task(
    questions={"text": "What is it?"},
    model="golden",
    weights="w",
    dtype="float32",
    config=GenerationConfig(max_tokens=6),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, a copy of one, and a file that is none."""
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for name in ("landscape", "portrait", "square"):
        shutil.copy(APPLE / "images" / f"{name}.png", pictures / f"{name}.png")
    shutil.copy(pictures / "square.png", pictures / "more" / "copy.png")
    (pictures / "broken.jpg").write_text("no picture")
    return pictures


@pytest.fixture
def engine(loaded: tuple[FastVLM, FastVLMProcessor]) -> Iterator[Engine]:
    with Engine(*loaded) as engine:
        yield engine


def find(folder: Path) -> list[Picture]:
    return find_pictures([str(folder)]).found


def run(engine: Engine, folder: Path, output: Path | None, task: Task = TASK, **options: Any) -> list[Record]:
    """The records of one run of the job."""
    if output is None:
        job = CaptionJob(task)
        return [record for _, record in job.run(engine, job.plan(find(folder)).todo)]
    with Journal(output) as journal:
        job = CaptionJob(task, journal, mixed=options.get("force", False))
        plan = job.plan(find(folder), **options)
        return [record for _, record in job.run(engine, plan.todo, fresh=options.get("force", False))]


def files(records: Sequence[Record]) -> list[str]:
    return [record["file"] for record in records]


def test_every_picture_gets_the_answer_that_it_gets_alone(
    engine: Engine, folder: Path, loaded: tuple[FastVLM, FastVLMProcessor]
) -> None:
    records = run(engine, folder, None)
    assert files(records) == ["broken.jpg", "landscape.png", "more/copy.png", "portrait.png", "square.png"]
    for record in records[1:]:
        alone = generate(*loaded, image=folder / record["file"], prompt="What is it?", max_tokens=6)
        assert record["text"] == remove_opening(alone.text.strip())
        assert record["generated_tokens"] == alone.generated_tokens
    assert records[0]["error"]["type"] == "ImageError"
    assert "not an image" in records[0]["error"]["message"]


def test_equal_content_is_asked_about_once(engine: Engine, folder: Path) -> None:
    records = {record["file"]: record for record in run(engine, folder, None)}
    assert records["square.png"]["duplicate_of"] == "more/copy.png"
    assert records["square.png"]["text"] == records["more/copy.png"]["text"]
    assert "seconds" not in records["square.png"]


class Gone:
    """An engine that has ended."""

    processor = None

    def submit(self, request: Request) -> Handle:
        handle = Handle(request)
        handle.end(CancelledError())
        return handle


def test_another_engine_can_go_on_where_one_has_ended(engine: Engine, folder: Path) -> None:
    job = CaptionJob(TASK)
    pictures = job.plan(find(folder)).todo
    with pytest.raises(CancelledError):
        list(job.run(Gone(), pictures))
    records = [record for _, record in job.run(engine, pictures)]
    assert [record.get("duplicate_of") for record in records] == [None, None, None, None, "more/copy.png"]
    assert [record["file"] for record in records if "error" in record] == ["broken.jpg"]


def test_a_second_run_does_only_what_is_new_or_changed(engine: Engine, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    assert len(run(engine, folder, output)) == 5
    before = output.read_bytes()
    assert run(engine, folder, output) == []
    assert output.read_bytes() == before
    shutil.copy(APPLE / "images" / "tiny.png", folder / "tiny.png")
    shutil.copy(APPLE / "images" / "large.png", folder / "portrait.png")
    assert files(run(engine, folder, output)) == ["portrait.png", "tiny.png"]
    assert files(run(engine, folder, output, retry_errors=True)) == ["broken.jpg"]
    os.utime(folder / "landscape.png")
    (again,) = run(engine, folder, output)
    assert again["text"] == json.loads(before.splitlines()[1])["text"]
    assert "seconds" not in again  # known by its content


@pytest.mark.parametrize(
    "damage", [{"text": None}, {"text": 5}, {"file": ["a"]}, {"answers": 5}, {"error": None}, {"error": {"type": "x"}}]
)
def test_a_picture_whose_record_was_damaged_is_asked_about_again(
    damage: dict[str, Any], engine: Engine, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    (_, *records) = run(engine, folder, output)
    lines = output.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **damage})
    output.write_text("\n".join(lines) + "\n")
    (again,) = run(engine, folder, output)
    assert (again["file"], again["text"]) == ("landscape.png", records[0]["text"])


def test_force_asks_again_about_everything(engine: Engine, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    run(engine, folder, output)
    records = run(engine, folder, output, force=True)
    assert len(records) == 5
    assert sum("seconds" in record for record in records) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"questions": {"text": "Why?"}}, "questions"),
        ({"weights": "other"}, "weights"),
        ({"config": GenerationConfig(max_tokens=7)}, "max_tokens"),
        ({"resolution": 128}, "resolution"),
        ({"system": "Be brief."}, "system"),
        ({"prefix": "A photo of"}, "prefix"),
        ({"max_words": 3}, "max_words"),
        ({"schema": {"type": "boolean"}}, "schema"),
    ],
)
def test_records_with_other_settings_are_not_taken_for_these(
    engine: Engine, folder: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    output = tmp_path / "captions.jsonl"
    run(engine, folder, output)
    other = Task(**{**vars(TASK), **change})
    with pytest.raises(ConfigError, match=rf"captions.jsonl: holds captions with other settings \({named}\)"):
        run(engine, folder, output, other)
    assert len(run(engine, folder, output, other, force=True)) == 5


def test_captions_begin_with_the_prefix_and_answers_do_not(
    engine: Engine, folder: Path, loaded: tuple[FastVLM, FastVLMProcessor]
) -> None:
    questions = {"text": "What is it?", "colour": "What colour is it?"}
    task = Task(**{**vars(TASK), "questions": questions, "prefix": "The image shows"})
    for record in run(engine, folder, None, task)[1:]:
        path = folder / record["file"]
        alone = generate(*loaded, image=path, prompt="What is it?", prefix="The image shows", max_tokens=6)
        assert record["text"] == alone.text.strip()
        colour = generate(*loaded, image=path, prompt="What colour is it?", max_tokens=6)
        assert record["answers"]["colour"] == colour.text.strip()
        assert record["generated_tokens"] == alone.generated_tokens + colour.generated_tokens
        assert record["text"].startswith("The image shows")


def test_answers_end_after_a_number_of_words_without_their_opening(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The image shows a dog, that runs over the green grass of a garden in the rain."
    tokens = iter(range(10**6))
    monkeypatch.setattr(StreamingDetokenizer, "add", lambda *_: f" {text.split()[next(tokens) % 17]}")
    shutil.rmtree(folder / "more")
    for path in ("landscape", "portrait", "broken"):
        next(folder.glob(f"{path}.*")).unlink()
    config = GenerationConfig(max_tokens=17, ignore_eos=True)
    for change, shown, generated in (
        ({"max_words": 2}, "A dog", 14),
        ({"max_words": 12}, "A dog, that runs over the green grass of a garden in", 16),
        ({"max_words": 2, "keep_openings": True}, "The image", 3),
        ({"max_words": 5, "prefix": "My dog:"}, "My dog: The image shows", 4),
    ):
        tokens = iter(range(10**6))
        (record,) = run(engine, folder, None, Task(**{**vars(TASK), "config": config, **change}))
        assert (record["text"], record["generated_tokens"], record["finish_reason"]) == (shown, generated, "stop")


def test_a_second_run_goes_on_with_a_prefix_and_a_number_of_words(engine: Engine, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    task = Task(**{**vars(TASK), "prefix": "A photo of", "max_words": 5})
    records = {record["file"]: record for record in run(engine, folder, output, task)}
    assert records["square.png"]["duplicate_of"] == "more/copy.png"
    assert records["square.png"]["text"] == records["more/copy.png"]["text"]
    assert run(engine, folder, output, task) == []


def test_captions_can_be_json_of_a_schema(engine: Engine, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    schema = {"properties": {"dogs": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["dogs"]}
    config = GenerationConfig(max_tokens=40)
    questions = {"text": "How many dogs?", "colour": "What colour is it?"}
    task = Task(**{**vars(TASK), "questions": questions, "config": config, "schema": schema})
    output = tmp_path / "captions.jsonl"
    for record in run(engine, folder, output, task)[1:]:
        assert record["text"] == f'{{"dogs":{record["parsed"]["dogs"]}}}'
        assert not record["answers"]["colour"].startswith("{")
    (again,) = run(engine, folder, output, task, retry_errors=True)
    assert again["error"]["type"] == "ImageError"
    line = output.read_text().splitlines()[1]
    output.write_text(line.replace('"parsed"', '"other"') + "\n")
    assert json.loads(line)["file"] in files(run(engine, folder, output, task)), "it was damaged"


def test_a_json_caption_that_is_cut_is_an_error(engine: Engine, folder: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    task = Task(**{**vars(TASK), "config": GenerationConfig(max_tokens=3), "schema": {"const": "a long word"}})
    for record in run(engine, folder, None, task)[1:]:
        assert record["error"]["type"] == "ConfigError"
        message = "the answer was cut after 3 tokens, so it is no JSON; allow more, or bound the schema"
        assert record["error"]["message"].endswith(f"{Path(record['file']).name}: {message}")
        assert "text" not in record


def test_several_questions_give_fields(engine: Engine, folder: Path) -> None:
    task = Task(**{**vars(TASK), "questions": {"colour": "What colour is it?", "name": "Is it {name}?"}})
    record = run(engine, folder, None, task)[1]
    assert set(record["answers"]) == {"colour", "name"}
    assert "text" not in record


def test_folders_that_share_names_are_told_apart(engine: Engine, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "portrait.png", other / "landscape.png")
    found = find_pictures([str(folder), str(other)]).found
    job = CaptionJob(TASK)
    records = [record for _, record in job.run(engine, job.plan(found).todo)]
    assert {str(folder / "landscape.png"), str(other / "landscape.png"), "portrait.png"} <= set(files(records))


def test_a_picture_that_changes_while_it_is_read_is_an_error(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine.submit

    def meddle(request: Any) -> Any:
        handle = submit(request)
        handle.wait()
        os.utime(request.image, ns=(1, 1))
        return handle

    monkeypatch.setattr(engine, "submit", meddle)
    records = run(engine, folder, None)
    assert {record["error"]["message"].partition(": ")[2] for record in records[1:]} == {
        "changed while it was read; run the command again"
    }


def test_copies_of_what_cannot_be_read_are_named_each(engine: Engine, folder: Path) -> None:
    shutil.copy(folder / "broken.jpg", folder / "more" / "broken too.jpg")
    for record in run(engine, folder, None):
        if "error" in record:
            assert record["error"]["message"].startswith(f"{folder / record['file']}: not an image")
            assert "duplicate_of" not in record


def test_a_picture_that_is_changed_back_is_done_once_more_and_then_known(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    first = folder / "portrait.png"
    for content in ("portrait", "large", "portrait"):
        first.write_bytes((APPLE / "images" / f"{content}.png").read_bytes())
        assert "portrait.png" in files(run(engine, folder, output))
    assert run(engine, folder, output) == []


def test_records_of_other_settings_do_not_count_once_there_are_some_of_these(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    other = Task(**{**vars(TASK), "questions": {"text": "Why?"}})
    run(engine, folder, output)
    with Journal(output) as journal:
        job = CaptionJob(other, journal, mixed=True)
        todo = job.plan(find(folder), force=True).todo[:2]  # and then it was interrupted
        assert len(list(job.run(engine, todo, fresh=True))) == 2
    assert len(run(engine, folder, output, other)) == 3
    assert run(engine, folder, output) == []


def test_a_model_of_another_name_continues_if_its_weights_are_the_same(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    run(engine, folder, output)
    assert run(engine, folder, output, Task(**{**vars(TASK), "model": "elsewhere/golden"})) == []


def test_several_questions_read_a_picture_once(
    engine: Engine, folder: Path, loaded: tuple[FastVLM, FastVLMProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []

    def load(source: Any, **rest: Any) -> TurnedImage:
        loads.append(getattr(source, "name", source))
        return images.load_turned(source, **rest)

    monkeypatch.setattr(processor, "load_turned", load)
    questions = {"colour": "What colour is it?", "name": "What is it?", "text": "Describe it."}
    task = Task(**{**vars(TASK), "questions": questions, "resolution": "auto", "keep_openings": True})
    shutil.rmtree(folder / "more")
    records = run(engine, folder, None, task)
    assert [loads.count(str(folder / file)) for file in files(records)] == [0, 1, 1, 1]
    monkeypatch.undo()
    for record in records[1:]:
        for name, prompt in questions.items():
            alone = generate(
                *loaded, image=folder / record["file"], prompt=prompt, resolution="auto", config=TASK.config
            )
            assert {**record["answers"], "text": record["text"]}[name] == alone.text.strip()


def test_a_picture_for_which_there_is_no_memory_fails_alone(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = images.preprocess

    def preprocess_small(image: Any, side: int) -> Any:
        if image.size[0] > image.size[1]:
            raise MemoryError
        return preprocess(image, side)

    monkeypatch.setattr(processor, "preprocess", preprocess_small)
    records = {record["file"]: record for record in run(engine, folder, None)}
    assert "landscape.png: there is not enough memory" in records["landscape.png"]["error"]["message"]
    assert "text" in records["portrait.png"]


def test_pictures_given_as_bytes_get_the_records_of_their_files(engine: Engine, folder: Path) -> None:
    expected = {record["file"]: record for record in run(engine, folder, None)}
    pictures = [(name, Encoded((folder / name).read_bytes(), name)) for name in sorted(expected)]
    for record in Asking(TASK).records(engine, pictures):
        of_file = expected[record["file"]]
        for key in ("fingerprint", "text", "sha256", "settings", "prompt_tokens", "width"):
            if "duplicate_of" not in of_file:
                assert record.get(key) == of_file.get(key)
        assert record["stat"] == []
        assert record.get("error", {}).get("type") == of_file.get("error", {}).get("type")


def test_a_journal_is_known_on_a_machine_where_files_have_other_times(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "captions.jsonl"
    task = replace(TASK, questions={"text": "What is {name}?"})
    first = run(engine, folder, output, task)
    shutil.copytree(folder, tmp_path / "elsewhere")
    again = run(engine, tmp_path / "elsewhere", output, task)
    assert [record.get("text") for record in again] == [record.get("text") for record in first]
    assert [record["file"] for record in again if "seconds" in record] == []


def test_shards_together_have_the_records_of_one_run(engine: Engine, folder: Path, tmp_path: Path) -> None:
    expected = {record["file"]: record.get("text") for record in run(engine, folder, None)}
    pictures = find(folder)
    together = {}
    for number in (1, 2):
        names, shard = Names(pictures), Shard(number, 2)
        with Journal(tmp_path / f"{number}.jsonl") as journal:
            job = CaptionJob(TASK, journal)
            mine = [picture for picture in pictures if shard.holds(names.of(picture))]
            plan = job.plan(mine, names=names)
            job.keep_shard(shard, len(mine), len(pictures))
            records = [record for _, record in job.run(engine, plan.todo)]
            assert CaptionJob(TASK, journal).plan(mine, names=names).done == len([r for r in records if "text" in r])
            together |= {record["file"]: record.get("text") for record in records}
        assert 0 < len(records) < len(pictures)
    assert together == expected


def test_pictures_with_one_name_keep_their_whole_paths_in_shards(tmp_path: Path) -> None:
    pictures = [Picture(f"{tmp_path}/{number}/cover.jpg", f"{tmp_path}/{number}") for number in range(40)]
    names = Names(pictures)
    parts = [[each for each in pictures if Shard(number, 4).holds(names.of(each))] for number in range(1, 5)]
    assert sorted(names.of(each) for part in parts for each in part) == sorted(each.path for each in pictures)
    assert all(parts)
