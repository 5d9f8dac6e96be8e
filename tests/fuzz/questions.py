"""Question files, and the journals that keep the answers to them."""

import json
from pathlib import Path
from random import Random
from typing import Any

from fastvlm_mlx.jobs.evaluate import evaluate, prediction_settings
from fastvlm_mlx.jobs.predictions import Predictions
from fastvlm_mlx.jobs.questions import read_questions
from tests.fuzz import damage
from tests.fuzz.pictures import files
from tests.fuzz.room import Room
from tests.fuzz.subject import Wrong, check_message, command

_IMAGES = ("missing.png", "broken.png", "", ".", "a.png\0", "x" * 300)
_QUESTIONS = ("What?", "Was ist das? 🐈", "<image>", "a" * 9000, "\u2028", "\ud800")
_ANSWERS = (["a cat"], "a cat", ["1,234"], ["nan", "inf"], [], [""], ["x"] * 10)
_LINES = (
    *(bytes(50), b"", b"[]", b"5", b"{}", b'{"key": 5}', b'{"key": [], "prediction": "x"}', b'{"key": "a"}'),
    *(b"\xff\xfe", b"[" * 50_000, b'{"key": "a", "prediction": 5}', b'{"key": "a", "prediction": "\\ud800"}'),
)
_METRICS = ("exact", "vqa", "relaxed", "anls")


def _rows(random: Random, room: Room) -> list[Any]:
    """A few questions about two pictures, some of them damaged."""
    picture = files()["PNG RGB 4"]
    for name, data in (("a.png", picture), ("b c.png", picture), ("broken.png", picture[:60])):
        (room.input / name).write_bytes(data)
    rows: list[Any] = [
        {
            "image": random.choice((*("a.png", "b c.png", str(room.input / "a.png")) * 2, *_IMAGES)),
            "question": random.choice(("What?", *_QUESTIONS)),
            "answers": random.choice((*((["a cat"],) * 6), *_ANSWERS)),
            **random.choice(({}, {"kind": "count"}, {"kind": "all"}, {"kind": "\x1b[31m"}, {"id": 7})),
        }
        for _ in range(random.choice((1, 2, 3)))
    ]
    return damage.some_value(random, rows) if random.random() < 0.5 else rows  # type: ignore[no-any-return]


def _write(random: Random, room: Room) -> Path:
    """A question file, now and then with damage of its own."""
    end = random.choice(("\n", "\n", "\r\n", "\n\n"))
    lines = [damage.to_json(row).decode() if random.random() < 0.5 else _plain(row) for row in _rows(random, room)]
    data = (end.join(lines) + random.choice(("", end))).encode(errors="surrogatepass")
    if random.random() < 0.2:
        odd = (
            b"",
            b"\n",
            b"\xef\xbb\xbf" + data,
            data + b"\xff",
            data[:-5],
            data.decode(errors="replace").encode("utf-16"),
        )
        data = random.choice(odd)
    elif random.random() < 0.2:
        data = damage.some_lines(random, data)
    path = room.input / "questions.jsonl"
    path.write_bytes(data)
    return path


def _plain(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)


def questions(random: Random, room: Room) -> None:
    """A question file that is scored: every row gets an answer or a reason."""
    path = room.watch(_write(random, room))
    if random.random() < 0.25:
        folder = str(room.watch(room.converted("apple in float32")))
        command(
            ["eval", "-m", folder, "--data", str(path), "-n", "1", *random.choice(((), ("--json",), ("--limit", "1")))]
        )
        return
    rows = read_questions(path)
    model, processor = room.model()
    metric = random.choice(_METRICS)
    report = evaluate(model, processor, rows, metric=metric, max_tokens=1, resolution=64)
    if len(report.answers) != len(rows):
        raise Wrong(f"questions: {len(report.answers)} answers for {len(rows)} rows")
    for answer in report.answers:
        if (answer.prediction is None) == (answer.error is None) or not 0.0 <= answer.score <= 1.0:
            raise Wrong(f"questions: {str(answer)[:200]}")
        if answer.error is not None:
            check_message(answer.error)
    json.dumps(report.to_dict(), allow_nan=False).encode()
    report.table()


def journal(random: Random, room: Room) -> None:
    """A damaged journal: what it still holds is used, the rest is asked again."""
    (room.input / "a.png").write_bytes(files()["PNG RGB 4"])
    path = room.input / "questions.jsonl"
    rows = [{"image": "a.png", "question": f"What is {number}?", "answers": ["x"]} for number in range(3)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model, processor = room.model()
    settings = prediction_settings(model, "checkpoint", resolution=64, max_tokens=1)
    room.written.add(room.work / "journals")

    def score() -> list[str | None]:
        with Predictions(room.work / "journals", settings) as kept:
            report = evaluate(model, processor, read_questions(path), resolution=64, max_tokens=1, predictions=kept)
        return [answer.prediction for answer in report.answers]

    expected = score()
    (kept,) = (room.work / "journals").glob("*.jsonl")
    change = random.choice((damage.some_lines, damage.some_bytes, _some_journal))
    kept.write_bytes(change(random, kept.read_bytes()))
    if (answers := score()) != expected:
        raise Wrong(f"journal: {answers} instead of {expected}")


def _some_journal(random: Random, data: bytes) -> bytes:
    """A journal that lost a line, the beginning or the end, as after a crash, or that holds something else."""
    lines = data.split(b"\n")
    place = random.randrange(1, len(lines) - 1)
    doubled, cut, more = lines[place] + lines[1], lines[place][:20], lines[place] + b"\0"
    lines[place] = random.choice((*_LINES, doubled, cut, more, lines[0]))
    return random.choice((b"", b"\n".join(lines), b"\n".join(lines)[:-3], b"\n".join(lines[1:]), lines[0]))
