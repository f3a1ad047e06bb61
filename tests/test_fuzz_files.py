"""Random damage to files that were whole: a right reading or one sentence, and nothing else, ever."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf import rlhf_sft
from rlhf.data.splits import load_split
from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.loading import load_policy, tokenizer_of
from rlhf.untrusted import check_pickle, read_json, read_pickle, tensor_header
from tests.splits import make_data, make_model_dir, quick_flags

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damages(draw) -> tuple[str, float, bytes]:
    """What happens to a file, where (a share of its size), and with which bytes."""
    kind = draw(st.sampled_from(["flip", "flip", "overwrite", "insert", "cut", "remove", "replace", "repeat"]))
    # The beginnings, where headers and pickles are, are hit more often.
    place = draw(st.one_of(st.floats(0, 1), st.floats(0, 0.02), st.floats(0.98, 1)))
    return kind, place, draw(st.binary(min_size=1, max_size=40))


def damage(path: Path, whole: bytes, how: tuple[str, float, bytes]) -> None:
    """Write `whole` to `path`, damaged, with the time that the file had: it looks as it was."""
    kind, place, noise = how
    at = min(int(place * len(whole)), len(whole) - 1)
    changed = {
        "flip": whole[:at] + bytes([whole[at] ^ (1 << noise[0] % 8)]) + whole[at + 1 :],
        "overwrite": whole[:at] + noise + whole[at + len(noise) :],
        "insert": whole[:at] + noise + whole[at:],
        "cut": whole[:at],
        "remove": whole[:at] + whole[at + len(noise) :],
        "replace": noise * (1 + at % 7),
        "repeat": whole[:at] + whole[max(0, at - 64) :],
    }[kind]
    stat = path.stat()
    path.write_bytes(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lab")
    data, model = make_data(root / "data", num_train=6, num_validation=1), make_model_dir(root / "model")
    rlhf_sft.main(quick_flags(rlhf_sft.SFTFlags, data, root / "run", model_name=model, save_interval=1, max_steps=2))
    return {"data": Path(data), "model": Path(model), "run": root / "run"}


def read_or_refused(read: Callable[[], Any], named: str) -> Any:
    """What `read()` returns; None where it raises a UserError, which has to name the file or folder."""
    try:
        return read()
    except UserError as refusal:
        sentence = str(refusal)
    assert named in sentence
    return None


def listed(folder: Path, stage: str) -> list[dict]:
    return [
        {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
        for row in load_split(folder, stage, "train")
    ]


@pytest.mark.parametrize("stage", ["finetune", "preference", "feedback", "prompts"])
def test_a_damaged_twin_never_shows(lab, tmp_path, stage):
    """C16: whatever happens to it, the rows are those of the `.pt`."""
    name, folder = f"{stage}_train.safetensors", tmp_path / "data"
    shutil.copytree(lab["data"], folder)
    rows, whole = listed(folder, stage), (folder / name).read_bytes()

    @given(damages())
    @FUZZ
    def check(how) -> None:
        damage(folder / name, whole, how)
        assert listed(folder, stage) == rows

    check()


@pytest.mark.parametrize("stage", ["finetune", "preference", "feedback", "prompts"])
def test_a_damaged_split_is_read_or_refused(lab, tmp_path, stage):
    """Without its twin, whose checksum would find all of it: rows of the right kind, or a sentence with its name."""
    name, folder = f"{stage}_train.pt", tmp_path / "data"
    shutil.copytree(lab["data"], folder)
    whole = (folder / name).read_bytes()

    @given(damages())
    @FUZZ
    def check(how) -> None:
        (folder / name).with_suffix(".safetensors").unlink(missing_ok=True)
        damage(folder / name, whole, how)
        rows = read_or_refused(lambda: listed(folder, stage), name)
        assert all(row["prompt_len"] >= 1 for row in rows or [])

    check()


def test_damaged_settings_are_read_or_refused(lab, tmp_path):
    """args.json of data and of a run, adapter and model configurations: as an object or as a sentence."""
    path = tmp_path / "args.json"
    whole = (lab["data"] / "args.json").read_bytes()

    @given(damages())
    @FUZZ
    def check(how) -> None:
        path.write_bytes(whole)
        damage(path, whole, how)
        assert isinstance(read_or_refused(lambda: read_json(path), str(path)), dict | None)

    check()


@given(st.binary(max_size=200))
@FUZZ
def test_random_bytes_are_refused(tmp_path, noise):
    """As anything: none of our formats is that short."""
    path = tmp_path / "noise"
    path.write_bytes(noise)
    for read in (tensor_header, read_pickle):
        with pytest.raises(UserError, match=str(path)):
            read(path)
    with contextlib.suppress(UserError):
        assert check_pickle(path) in (True, False)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(["stages", "tokenizer", "format", "arguments"]), value=_values)
@FUZZ
def test_an_args_json_of_any_types(lab, tmp_path, key, value):
    folder = tmp_path / "data"
    if not folder.exists():
        shutil.copytree(lab["data"], folder)
    info = json.loads((lab["data"] / "args.json").read_text())
    (info if key == "stages" else info["stages"]["finetune"])[key] = value
    (folder / "args.json").write_text(json.dumps(info))
    with contextlib.suppress(UserError):
        assert len(load_split(folder, "finetune", "train")) == 6


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_read_or_refused(lab, tmp_path, name):
    """A flipped bit of a weight is still a weight; all else is a sentence, also what libraries raise of their own."""
    folder = tmp_path / "model"
    shutil.copytree(lab["model"], folder)
    whole = (folder / name).read_bytes()

    @given(damages())
    @settings(FUZZ, max_examples=25)
    def check(how) -> None:
        damage(folder / name, whole, how)
        read_or_refused(lambda: load_policy(str(folder), ModelFlags(), trainable=False), str(folder))
        read_or_refused(lambda: tokenizer_of(str(folder), ModelFlags()), str(folder))

    check()


@pytest.mark.parametrize("name", ["state.json", "optimizer.pt", "model/model.safetensors"])
def test_a_damaged_checkpoint_is_read_or_passed_over(lab, tmp_path, name):
    """C23: a run goes on, or says in one sentence why it can't; no exception of a library, whatever the damage."""
    newest = sorted((lab["run"] / "checkpoints").glob("step-*"))[-1].relative_to(lab["run"])
    whole = (lab["run"] / newest / name).read_bytes()
    flags = {"model_name": str(lab["model"]), "save_interval": 1, "resume": True}

    @given(damages())
    @settings(FUZZ, max_examples=8)
    def check(how) -> None:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(lab["run"], run, symlinks=True)
        (run / "summary.json").unlink()  # it has not ended yet
        damage(run / newest / name, whole, how)
        with contextlib.suppress(UserError):
            rlhf_sft.main(quick_flags(rlhf_sft.SFTFlags, str(lab["data"]), run, **flags))

    check()
