"""`Captioner` in Ray Data: what it reads, what it writes, and what it refuses."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx import ConfigError
from fastvlm_mlx.cluster import Captioner, caption_dataset
from fastvlm_mlx.cluster.captioner import short_key
from fastvlm_mlx.jobs.journal import Journal
from tests.cluster.conftest import TwoNodes, run
from tests.cluster.test_caption import folder_of, scene

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastvlm-mlx[ray]'")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster(two_nodes: TwoNodes) -> Iterator[TwoNodes]:
    ray.init(two_nodes.address, log_to_driver=False, logging_level="CRITICAL")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield two_nodes
    ray.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data") / "pictures", 12)


def test_a_folder_becomes_parquet_and_a_journal_that_a_local_run_goes_on_with(
    cluster: TwoNodes, pictures: Path, tmp_path: Path
) -> None:
    """Answers are those of a run without Ray, on both nodes."""
    files = ray.data.read_binary_files(str(pictures), include_paths=True, override_num_blocks=4)
    caption_dataset(files, "demo", batch_size=3).write_parquet(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out").to_pandas().sort_values("file")
    assert list(table["error"]) == [""] * 12
    assert "bytes" not in table

    assert run(pictures, "-o", tmp_path / "alone.jsonl").returncode == 0
    with Journal(tmp_path / "alone.jsonl", read_only=True) as journal:
        assert [record["text"] for record in journal] == list(table["text"])
    ours = json.loads(table["record"].iloc[0])
    assert ours["settings"]["questions"] == {"text": "Describe the image."}


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(**Captioner.arguments("demo"))


def test_parquet_of_hugging_face_and_webdataset_are_read(
    cluster: TwoNodes, captioner: Captioner, pictures: Path, tmp_path: Path
) -> None:
    data = [path.read_bytes() for path in sorted(pictures.iterdir())]
    images = [{"bytes": each, "path": f"{number}.png"} for number, each in enumerate(data)]
    pq.write_table(pa.table({"image": images, "label": range(12)}), tmp_path / "data.parquet")
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for number, each in enumerate(data):
            member = tarfile.TarInfo(f"{number:03}.png")
            member.size = len(each)
            archive.addfile(member, io.BytesIO(each))

    first = captioner(ray.data.read_parquet(str(tmp_path / "data.parquet")).take_batch(12))
    second = captioner(ray.data.read_webdataset(str(tmp_path / "data.tar"), decoder=None).take_batch(12))
    assert list(first["file"]) == [f"{number}.png" for number in range(12)]
    assert list(second["file"]) == [f"{number:03}" for number in range(12)]
    assert list(first["text"]) == list(second["text"])
    assert first["label"][3] == 3
    assert json.loads(first["record"][3])["sha256"] == json.loads(second["record"][3])["sha256"]


def test_rows_that_have_a_record_are_left_out(captioner: Captioner) -> None:
    batch = {"bytes": np.array([b"a", b"b"], object), "path": np.array(["a", "b"], object)}
    known = [json.loads(record)["fingerprint"] for record in captioner(batch)["record"]]
    again = Captioner(**Captioner.arguments("demo"), known=np.array([short_key(known[0])], np.uint64))
    assert list(again(batch)["file"]) == ["b"]


def test_arrays_and_bytes_give_the_same_answer(captioner: Captioner) -> None:
    image = scene(3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = captioner({"bytes": np.array([buffer.getvalue()], object)})
    array = captioner({"image": np.asarray(image)[None], "path": np.array(["a.png"], object)})
    assert encoded["text"][0] == array["text"][0] != ""
    assert array["file"][0] == "a.png"
    assert len(encoded["file"][0]) == 64


@pytest.mark.parametrize("broken", [None, b"", b"nothing", {"bytes": None, "path": "a.png"}], ids=repr)
def test_what_is_no_picture_gets_an_error_and_no_text(captioner: Captioner, broken: Any) -> None:
    values = np.empty(1, object)
    values[0] = broken
    row = captioner({"image": values, "path": np.array(["a.png"], object)})
    assert row["text"][0] == ""
    assert "a.png" in row["error"][0]


def test_columns_of_the_data_set_are_never_overwritten(captioner: Captioner) -> None:
    with pytest.raises(ConfigError, match=r"the data set has text already; rename or drop it"):
        captioner({"bytes": np.array([b""], object), "text": np.array(["mine"], object)})
    with pytest.raises(ConfigError, match="no column with pictures; it has label, so name one"):
        captioner({"label": np.zeros(1)})
    with pytest.raises(ConfigError, match="a question is called error"):
        Captioner.arguments("demo", ask={"error": "Is it?"})


def test_an_actor_that_would_answer_in_another_way_is_refused() -> None:
    arguments = Captioner.arguments("demo")
    arguments["expected"] = {**arguments["expected"], "weights": "0" * 32}
    with pytest.raises(ConfigError, match="has other files under the name of the model"):
        Captioner(**arguments)
