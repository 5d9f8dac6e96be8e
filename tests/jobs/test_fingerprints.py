import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from fastvlm_mlx.jobs import fingerprints
from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint, file_digests, fingerprint
from tests.conftest import Converted


def test_the_order_of_keys_does_not_matter() -> None:
    assert fingerprint({"a": 1, "b": None}) == fingerprint({"b": None, "a": 1})
    assert len({fingerprint(*parts) for parts in (("a", "b"), ("ab",), ("b", "a"), (["a", "b"],))}) == 4


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a file that has just been written count as one that was written a while ago."""
    monkeypatch.setattr(fingerprints, "_SETTLED", 0)


def reads(files: list[Path], store: Path) -> tuple[list[str], int]:
    """The digests, and how many bytes had to be read for them."""
    read: list[int] = []
    digests = file_digests(files, store, lambda done, total, what: read.append(done))
    return digests, len(read)


def test_a_file_is_read_once_and_again_after_a_change(tmp_path: Path, settled: None) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(file.name.encode())
        os.utime(file, (1, 1))
    store = tmp_path / "cache" / "digests.json"
    expected = [hashlib.sha256(name).hexdigest() for name in (b"a", b"b")]
    assert reads(files, store) == (expected, 2)
    assert reads(files, store) == (expected, 0)
    time.sleep(0.01)  # longer than a tick of the clock that changes are stamped with
    files[0].write_bytes(b"c")
    os.utime(files[0], (1, 1))  # as large and as old as before
    assert reads(files, store) == ([hashlib.sha256(b"c").hexdigest(), expected[1]], 1)
    files[1].unlink()
    reads(files[:1], store)
    for damage in (b"", b"{", b"[]", b'{"x": 7}', json.dumps({str(files[0]): {"version": 1}}).encode()):
        store.write_bytes(damage)
        assert reads(files[:1], store)[1] == 1
        assert list(json.loads(store.read_bytes())) == [str(files[0])]


def test_a_file_that_has_just_been_written_is_not_trusted_to_stay(tmp_path: Path) -> None:
    file, store = tmp_path / "a", tmp_path / "digests.json"
    file.write_bytes(b"a")
    assert reads([file], store) == reads([file], store)
    assert reads([file], store)[1] == 1


def test_a_store_that_cannot_be_written_is_done_without(tmp_path: Path, settled: None) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "store").mkdir()
    for _ in range(2):
        assert reads([tmp_path / "a"], tmp_path / "store")[1] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "store"]


def test_a_checkpoint_is_its_weights_tokenizer_and_configuration(converted: Converted, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(converted("apple"), folder)
    original = checkpoint_fingerprint(folder)
    assert original == checkpoint_fingerprint(converted("apple"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "source": {"name": "another"}}))
    (folder / "README.md").write_text("Words.")
    assert checkpoint_fingerprint(folder) == original
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [7]}))
    assert checkpoint_fingerprint(folder) != original
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    assert checkpoint_fingerprint(folder) != original
