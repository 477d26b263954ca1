"""How names of models and data resolve: a path first, then the cache, then the hub; and what is said where they do not."""

from __future__ import annotations

import json

import pytest

from limbeck import cache
from limbeck.errors import DataError, ModelError


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty cache, home, hub cache and working folder."""
    for name in ("cache", "home", "hub", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def make_model(path, config='{"num_hidden_layers": 4, "hidden_size": 32}'):
    path.mkdir(parents=True)
    (path / "config.json").write_text(config)
    return path


def test_a_tokenizer_in_text_files_is_content_of_a_model(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "merges.txt").write_text("a b")
    before = cache.model_content(str(folder))
    (folder / "merges.txt").write_text("a b\nab c")
    assert cache.model_content(str(folder)) != before


# ---- where the cache is


def test_cache_dir(monkeypatch, tmp_path):
    assert cache.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LIMBECK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "limbeck"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "limbeck"


def test_what_the_cache_holds(folders):
    assert (cache.cached_models(), cache.cached_data()) == ([], [])
    make_model(folders / "cache" / "models" / "owner" / "tiny")
    (folders / "cache" / "models" / "owner" / "half").mkdir()
    (folders / "cache" / "data" / "set").mkdir(parents=True)
    (folders / "cache" / "data" / "set" / "train.jsonl").write_text("{}")
    assert (cache.cached_models(), cache.cached_data()) == (["owner/tiny"], ["set/train"])


# ---- models


def test_a_folder_comes_before_the_cache_and_the_cache_before_the_hub(folders):
    assert cache.resolve_model("owner/tiny") == "owner/tiny"
    cached = make_model(folders / "cache" / "models" / "owner" / "tiny")
    assert cache.resolve_model("owner/tiny") == str(cached)
    make_model(folders / "cwd" / "owner" / "tiny")
    assert cache.resolve_model("owner/tiny") == "owner/tiny"
    assert cache.model_config("owner/tiny")["hidden_size"] == 32


def test_a_tilde_is_the_home_folder(folders):
    make_model(folders / "home" / "tiny")
    assert cache.resolve_model("~/tiny") == str(folders / "home" / "tiny")
    (folders / "home" / "set.jsonl").write_text("{}")
    assert cache.resolve_data("~/set.jsonl") == folders / "home" / "set.jsonl"


@pytest.mark.parametrize(
    "name", ["tiny", "./tiny", "/no/such/tiny", "~/tiny", "~nobody-of-that-name/x", "a/b/c", "a\0b", "n" * 300, "/" + "n" * 300]
)
def test_a_model_that_can_be_nowhere_is_refused(name):
    with pytest.raises(ModelError, match="no such folder, and not a hub name of the form owner/model"):
        cache.resolve_model(name)


def test_the_nearest_model_is_named(folders):
    make_model(folders / "cache" / "models" / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    make_model(folders / "cwd" / "teacher")
    with pytest.raises(ModelError, match=r"; did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'\?"):
        cache.resolve_model("SmolLM2-135M-Instruct")
    with pytest.raises(ModelError, match=r"; did you mean 'teacher'\?"):
        cache.resolve_model("./techer")
    with pytest.raises(ModelError, match=rf"; did you mean '{folders}/cwd/teacher'\?"):
        cache.resolve_model(f"{folders}/cwd/teachers")


def test_a_folder_without_config(folders):
    (folders / "cwd" / "empty").mkdir()
    with pytest.raises(ModelError, match=r"model 'empty': the folder has no config\.json; expected a model saved by save_pretrained"):
        cache.resolve_model("empty")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not readable as JSON"),
        ("", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        ("[]", "found list, expected a mapping"),
        ("null", "found NoneType, expected a mapping"),
        ('{"num_hidden_layers": "four"}', "num_hidden_layers: found 'four', expected a number from 1"),
        ('{"num_hidden_layers": 0}', "num_hidden_layers: found 0, expected a number from 1"),
        ('{"num_hidden_layers": true}', "num_hidden_layers: found True, expected a number from 1"),
        ('{"hidden_size": null}', "hidden_size: found None, expected a number from 1"),
        ('{"text_config": {"hidden_size": -3}}', "hidden_size: found -3, expected a number from 1"),
    ],
)
def test_a_broken_config_is_named(folders, config, message):
    folder = make_model(folders / "cwd" / "model", "")
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(ModelError) as caught:
        cache.model_config("model")
    assert str(caught.value).startswith("model/config.json: ")
    assert message in str(caught.value)


def test_the_config_of_a_text_model_inside_of_another(folders):
    make_model(folders / "cwd" / "model", json.dumps({"hidden_size": 1, "text_config": {"hidden_size": 7, "num_hidden_layers": 3}}))
    assert cache.model_config("model") == {"hidden_size": 7, "num_hidden_layers": 3}
    make_model(folders / "cwd" / "plain", json.dumps({"hidden_size": 1, "text_config": None}))
    assert cache.model_config("plain")["hidden_size"] == 1


def test_a_hub_model_that_is_not_at_hand_has_no_config():
    assert cache.model_config("some-owner/some-model-that-nobody-has") is None


@pytest.mark.parametrize("name", ["a b/c", "owner/" + "n" * 200, "owner/--x", "-a/b"])
def test_what_cannot_be_a_hub_name_is_refused(name):
    with pytest.raises(ModelError, match="no such folder, and not a hub name"):
        cache.model_config(name)


# ---- data


def test_data_resolves_to_a_path_then_to_the_cache(folders):
    (folders / "cache" / "data" / "set").mkdir(parents=True)
    cached = folders / "cache" / "data" / "set" / "train.jsonl"
    cached.write_text("{}")
    assert cache.resolve_data("set/train") == cached
    (folders / "cwd" / "set").mkdir()
    (folders / "cwd" / "set" / "train").write_text("{}")
    assert cache.resolve_data("set/train").read_text() == "{}"
    assert cache.resolve_data("set/train") != cached


def test_unknown_data_names_the_nearest_file_or_what_is_known(folders):
    (folders / "cwd" / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"data 'trian\.jsonl': no such file or data set; did you mean 'train\.jsonl'\?"):
        cache.resolve_data("trian.jsonl")
    (folders / "cache" / "data" / "set").mkdir(parents=True)
    (folders / "cache" / "data" / "set" / "heldout.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"; did you mean 'set/heldout'\?"):
        cache.resolve_data("set/held-out")
    with pytest.raises(DataError, match=r"; known data sets: .*set/heldout.*`limbeck assets list`"):
        cache.resolve_data("something else entirely")


@pytest.mark.parametrize("name", ["", ".", "/", "n" * 300, "a\0b", "~nobody-of-that-name/x", "a/b/c/d"])
def test_names_that_are_no_data(name):
    with pytest.raises(DataError, match="a folder, expected a file" if name in (".", "/") else "no such file or data set"):
        cache.resolve_data(name)


def test_a_folder_is_no_file_of_data_and_every_set_is_named_once(folders):
    (folders / "cwd" / "rows").mkdir()
    (folders / "cache" / "data" / "limbeck").mkdir(parents=True)
    (folders / "cache" / "data" / "limbeck" / "demo-train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"data 'rows': a folder, expected a file; known data sets: ") as error:
        cache.resolve_data("rows")
    assert str(error.value).count("limbeck/demo-train") == 1


def test_a_run_has_its_model_in_a_folder_of_its_own(folders):
    make_model(folders / "cwd" / "run" / "student")
    with pytest.raises(ModelError, match=r"model 'run/': the folder has no config\.json; .*did you mean 'run/student'\?"):
        cache.resolve_model("run/")
