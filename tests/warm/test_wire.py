import json
from typing import Any

import pytest

from fastvlm_mlx import errors
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.warm.wire import Question, error_record, line, piece_record, read_error, read_piece

QUESTION = Question(
    images=[Encoded(b"\x89PNG\n\n", "a\udcff.png", "image/png"), Encoded(b"", "empty"), Encoded(b"\n{", "stdin")],
    prompt=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Was ist das, 猫?\n"}]}],
    system="",
    resolution="auto",
    background="#fff",
    config=GenerationConfig(
        max_tokens=7, temperature=0.25, seed=2**64 - 1, stop=("a", "\n"), logit_bias={5: -1.5}, top_k=3
    ),
    choices=["yes", "no"],
    schema={"type": "object"},
    prefix="A",
    max_words=3,
    removes_openings=True,
)


def test_a_question_arrives_as_it_was_sent() -> None:
    question, extra = Question.decode(QUESTION.encode(measure=True))
    assert question == QUESTION
    assert extra == {"measure": True}


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[]\n", b"nonsense\n", b'{"images": 3, "config": {}}\n'])
def test_a_damaged_question_is_an_error_that_the_server_expects(damage: bytes) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, FastVLMError)):
        Question.decode(damage)


def test_an_image_that_is_cut_off_is_noticed() -> None:
    with pytest.raises(ValueError, match="cut off"):
        Question.decode(QUESTION.encode()[:-1])


def test_a_setting_out_of_range_is_named() -> None:
    body = QUESTION.encode().replace(b'"max_tokens": 7', b'"max_tokens": 0')
    with pytest.raises(ConfigError, match="max_tokens"):
        Question.decode(body)


def test_a_piece_arrives_as_it_was_sent() -> None:
    piece = GenerationResult(
        text="\ud800\x1b é",
        token_ids=(1, 2),
        prompt_tokens=30,
        visual_tokens=16,
        reused_tokens=3,
        generated_tokens=2,
        finish_reason="stop",
        stop_string="x",
        timings=Timings(preprocess=0.1, ttft=1 / 3, decode=1e-9, total=2.0, queue=0.5),
    )
    sent: dict[str, Any] = json.loads(line(piece_record(piece)))
    assert read_piece(sent["piece"]) == piece


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_an_error_keeps_its_class_and_its_message(name: str) -> None:
    error = getattr(errors, name)("a\nb.png: is no image")
    arrived = read_error(json.loads(line(error_record(error)))["error"])
    assert (type(arrived), str(arrived)) == (type(error), str(error))


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "printable", "Any", "nonsense"])
def test_what_is_no_error_of_ours_becomes_the_general_one(name: str) -> None:
    assert type(read_error({"type": name, "message": "m"})) is FastVLMError


def test_the_client_imports_what_errors_need_only() -> None:
    assert type(read_error(error_record(ImageError("x"))["error"])) is ImageError
