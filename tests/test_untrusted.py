"""Files that lie, opened by rlhf/untrusted.py alone: what test_hostile_*.py ask of whole scripts, in milliseconds."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf import untrusted
from rlhf.untrusted import (
    UnreadableFileError,
    check_finite,
    check_folder,
    check_inside,
    check_pickle,
    open_file,
    read_json,
    read_tensors,
    shards,
    tensor_header,
)
from tests import hostile


@pytest.mark.parametrize("lie", hostile.bad_safetensors())
def test_headers_that_lie(tmp_path, lie):
    path, given = tmp_path / "model.safetensors", hostile.bad_safetensors()[lie]
    hostile.safetensors(path, *given[:2], length=given[2] if len(given) > 2 else None)
    with pytest.raises(UnreadableFileError, match=r"the weights in .*model\.safetensors cannot be read"):
        tensor_header(path)


def test_a_whole_file_is_read(tmp_path):
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    assert {name: entry.shape for name, entry in tensor_header(tmp_path / "a.safetensors").items()} == {
        "a": (4,),
        "b": (2, 3),
    }
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], torch.arange(4.0))


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    """A compressed record, and one that stands there twice."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10_000))
    with pytest.raises(UnreadableFileError, match="compressed records"):
        check_pickle(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", bytes(10))
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("archive/data.pkl", bytes(10))
    with pytest.raises(UnreadableFileError, match="records overlap"):
        check_pickle(path)
    torch.save({"a": torch.ones(3)}, path)
    assert check_pickle(path)


def test_json_is_bounded_and_says_each_thing_once(tmp_path):
    path = tmp_path / "a.json"
    for content, words in (
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("{" + " " * untrusted.LARGEST_JSON + "}", "more than 4 MB"),
        ("[1]", "no JSON object but a list"),
    ):
        path.write_text(content)
        with pytest.raises(UnreadableFileError, match=words):
            read_json(path)
    path.write_text('{"a": NaN}')
    assert read_json(path, constants=True)["a"] != 0


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFileError, match="is no file but a folder, a pipe or a device"):
        open_file(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "a\\b", ""])
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": name}}))
    with pytest.raises(UnreadableFileError, match="weights lie in its own folder"):
        shards(index)


def test_configurations_with_more_layers_than_any_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 10**9}}))
    with pytest.raises(UnreadableFileError, match="num_hidden_layers=1000000000"):
        check_folder(tmp_path)


def test_links_that_lead_out(tmp_path):
    """Of the folder itself and of a file in it; one that stays inside is taken."""
    experiment = tmp_path / "run"
    (experiment / "final").mkdir(parents=True)
    (experiment / "final" / "config.json").write_text("{}")
    (experiment / "last").symlink_to("final")
    check_inside(experiment / "last", experiment)
    (experiment / "final" / "model.safetensors").symlink_to(Path("/etc/passwd"))
    with pytest.raises(UnreadableFileError, match=r"model\.safetensors is a link that leads out"):
        check_inside(experiment / "final", experiment)


def test_one_value_that_is_not_finite_is_found():
    large = torch.full((10,), 3e38)  # whose sum overflows
    check_finite([("a", torch.ones(2)), ("large", large), ("ids", torch.ones(2, dtype=torch.long))], "x")
    with pytest.raises(untrusted.UserError, match="x: b holds NaN"):
        check_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")]))], "x")
