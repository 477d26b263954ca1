"""The command line as people meet it: bad input gives one message and exit code 2, and the verbs work from start to end."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import limbeck
from helpers import make_tokenizer, save_model, tiny_model, write_jsonl
from limbeck import cli

ROWS = [
    {"messages": [{"role": "user", "content": f"Add two and {word}."}, {"role": "assistant", "content": f"The answer is {word} and two."}]}
    for word in ("one", "two", "three", "four", "five")
]
COMMANDS = ("demo", "check", "train", "capture", "eval", "study", "report", "schema", "assets", "assets list", "assets fetch")
COMMANDS += ("store", "store inspect", "store verify", "store repair")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, model_dir, make_model_dir):
    """A working folder with a recipe of real, tiny models, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    write_recipe(tmp_path / "recipe.yaml", student={"model": str(model_dir)})
    return tmp_path


@pytest.fixture(scope="module")
def teacher_dir(make_model_dir):
    return make_model_dir(layers=3, width=48, seed=2)


def write_recipe(path, **changes):
    tree = {
        "source": {"type": "dataset", "data": "data.jsonl"},
        "objective": [{"type": "ce"}],
        "train": {"steps": 2, "batch_size": 2, "optimizer": {"learning_rate": "1e-3"}},
    }
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.fixture
def run(monkeypatch, capfd):
    """`run("train", "recipe.yaml")` calls the real entry point: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["limbeck", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return caught.value.code or 0, out, err

    return call


@pytest.fixture
def refused(run):
    """`refused("train", "x.yaml")` is the one message; it is the same for people and for programs."""

    def call(*arguments, alone=True):
        code, out, err = run(*arguments, "--json")
        assert code == 2, err
        assert "Traceback" not in err
        message = json.loads(out)["error"]
        assert out.count("\n") == 1
        assert err.count("error: ") == 1 and err.endswith(f"error: {message}\n")
        if alone:
            assert err == f"error: {message}\n"
        return message

    return call


@pytest.fixture
def works(run):
    """`works("train", "recipe.yaml")` is the JSON object that comes last on stdout, where nothing else is."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return call


# ---- bad recipes: said before anything heavy loads

BAD_RECIPES = {
    "missing file": (["recpie.yaml"], "recpie.yaml: no such file or directory; did you mean 'recipe.yaml'?"),
    "folder": (["."], ".: is a directory"),
    "unknown key": (["recipe.yaml", "train.stpes=3"], "recipe.yaml: train.stpes: unknown key; did you mean 'steps'?"),
    "unknown key of a term": (
        ["recipe.yaml", "objective.0.wieght=3"],
        "recipe.yaml: objective.0.wieght: unknown key; did you mean 'weight'?",
    ),
    "unknown term": (
        ["recipe.yaml", "objective.0.type=logit"],
        "recipe.yaml: objective.0: found type 'logit', expected one of: ce, hidden, hidden_as_published, logits, mse_logits, ranking; did",
    ),
    "wrong type": (
        ["recipe.yaml", "train.steps=many"],
        "recipe.yaml: train.steps: found 'many', expected a valid integer, unable to parse string as an integer",
    ),
    "negative temperature": (
        ["recipe.yaml", "objective.0={type: logits, temperature: -1}"],
        "recipe.yaml: objective.0.temperature: found -1, expected a number greater than or equal to 0.01",
    ),
    "weight 0 everywhere": (
        ["recipe.yaml", "objective.0.weight=0"],
        "recipe.yaml: objective: every weight is 0; expected at least one term with a positive weight",
    ),
    "no teacher": (["recipe.yaml", "objective.0.type=logits"], "recipe.yaml: objective: the 'logits' term needs a teacher's output, and"),
    "override without value": (["recipe.yaml", "train.steps"], "override 'train.steps': expected key.path=value"),
    "override of nothing": (["recipe.yaml", "objective.7.weight=1"], "override 'objective.7.weight=1': found index '7', expected a number"),
    "override that is no YAML": (["recipe.yaml", "train.steps=[1"], "override 'train.steps=[1': not readable as YAML"),
    "broken YAML": (
        ["broken.yaml"],
        "broken.yaml: not readable as YAML: expected the node content, but found '<stream end>' (line 2, column 1)",
    ),
    "unsafe YAML": (["unsafe.yaml"], "unsafe.yaml: not readable as YAML: could not determine a constructor for the tag"),
    "no mapping": (["list.yaml"], "list.yaml: found ['a'], expected a mapping of keys to values"),
    "model folder that is not there": (
        ["recipe.yaml", "student.model=./modle"],
        "recipe.yaml: model './modle': no such folder, and not a hub",
    ),
    "model name of no form": (["recipe.yaml", "student.model=SmolLM2"], "recipe.yaml: model 'SmolLM2': no such folder, and not a hub"),
    "broken config.json": (["recipe.yaml", "student.model=broken"], "recipe.yaml: broken/config.json: not readable as JSON: "),
    "data that is not there": (
        ["recipe.yaml", "source.data=dta.jsonl"],
        "recipe.yaml: data 'dta.jsonl': no such file or data set; did you mean 'data.jsonl'?",
    ),
    "benchmark data that is not there": (
        ["recipe.yaml", "evaluate=[{type: bits_per_byte, data: dta.jsonl}]"],
        "recipe.yaml: data 'dta.jsonl': no such file or data set; did you mean 'data.jsonl'?",
    ),
    "capture that is not there": (
        ["recipe.yaml", "teacher={type: store, path: nowhere}"],
        "recipe.yaml: store 'nowhere': found no manifest.json, expected a folder written by `limbeck capture`",
    ),
}


@pytest.fixture
def bad_files(folder):
    (folder / "broken.yaml").write_text("train: [1,\n")
    (folder / "unsafe.yaml").write_text("a: !!python/object/apply:os.system [echo]")
    (folder / "list.yaml").write_text("[a]")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes(refused, bad_files, command, name):
    arguments, expected = BAD_RECIPES[name]
    assert refused(command, *arguments).startswith(expected)
    assert not Path("runs").exists()


def test_bad_recipes_need_no_torch(bad_files, folder):
    """The same in one fresh process, with no torch in it at the end."""
    program = """
import json, sys
from limbeck.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["limbeck", *arguments]
    try:
        main()
    except SystemExit as stop:
        codes.append(stop.code)
print(json.dumps([codes, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""
    calls = [[command, *arguments] for arguments, _ in BAD_RECIPES.values() for command in ("check", "train", "capture")]
    calls.append(["capture", "recipe.yaml", "--out", "data.jsonl"])
    calls.append(["eval", "recipe.yaml", "--recipe", "recipe.yaml"])
    done = subprocess.run([sys.executable, "-c", program, json.dumps(calls)], capture_output=True, text=True)
    assert json.loads(done.stdout) == [[2] * len(calls), []], done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == len(calls)


def test_a_message_is_one_line_however_long_its_paths_are(run, folder):
    """A path that was broken in two cannot be copied."""
    long = folder / ("a" * 100) / ("b" * 100)
    _, _, err = run("train", long / "recipe.yaml")
    assert err == f"error: {long}/recipe.yaml: no such file or directory\n"


def test_the_error_is_the_same_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "train", "recipe.yaml", "trian.steps=1", "--json"], capture_output=True, text=True
    )
    message = "recipe.yaml: trian: unknown key; did you mean 'train'?"
    assert (done.returncode, done.stdout, done.stderr) == (2, json.dumps({"error": message}) + "\n", f"error: {message}\n")


def test_a_result_that_cannot_be_written_is_one_message():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "limbeck", "init", "sft", "--out", "new.yaml", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: system: No space left on device"


def test_a_result_comes_from_the_main_process_alone(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("init", "sft", "--out", "new.yaml", "--json") == (0, "", "")
    code, out, err = run("train", "nowhere.yaml", "--json")
    assert (code, out) == (2, "") and err.startswith("error: nowhere.yaml: no such file")


def test_a_long_path_is_whole_on_a_narrow_terminal(run, monkeypatch, folder):
    from limbeck import log

    shutil.copytree(Path(yaml.safe_load(Path("recipe.yaml").read_text())["student"]["model"]), long := folder / ("model-" * 12))
    monkeypatch.setattr(log.console, "_width", 60)
    code, _, err = run("check", "recipe.yaml", f"student.model={long}")
    assert code == 0 and "\u2026" not in err and str(long) in "".join(err.split())


# ---- misuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing argument 'RECIPE'. See: limbeck train --help"),
        (["train", "recipe.yaml", "--ouf", "x"], "No such option: --ouf"),
        (["trian", "recipe.yaml"], "No such command 'trian'. Did you mean 'train'?"),
        (["demo", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["demo", "--seeds", "many"], "Invalid value for '--seeds'"),
        (["eval", "x"], "eval: found neither of --recipe and --suite"),
        (["assets", "fetch"], "Missing argument 'NAME...'"),
    ],
)
def test_misuse(refused, arguments, message):
    assert refused(*arguments).startswith(message)


def test_misuse_of_schema(run):
    code, out, err = run("schema", "recipes")
    assert (code, out) == (2, "") and err.startswith("error: Invalid value for ") and "'recipe', 'study'" in err


@pytest.mark.parametrize("arguments", [[], ["assets"]])
def test_no_command_shows_the_help(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and "Usage:" in out and "error" not in err


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run, command):
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"limbeck {command}" in out


def test_help_lists_every_command(run):
    out = run("--help")[1]
    assert all(command.split()[0] in out for command in COMMANDS)


def test_help_is_fast_and_needs_no_torch():
    program = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\nfrom limbeck.cli import main\nmain()"
    seconds = []
    for command in ("", "train", "assets list"):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program, *command.split(), "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and "Usage:" in done.stdout, done.stderr
    assert min(seconds) < 1.5, seconds


# ---- check and schema


def test_check(works, run):
    found = works("check", "recipe.yaml", "train.steps=9")
    assert found["kind"] == "recipe" and found["num_conversations"] == len(ROWS) and found["student_shape"]["num_layers"] == 4
    code, out, err = run("check", "recipe.yaml")
    assert (code, out) == (0, "") and "recipe.yaml: valid recipe" in err


def test_check_says_for_what_a_recipe_is_good(run, works):
    assert works("check", "recipe.yaml", "capture={path: store}")["verbs"] == ["train"]  # with no teacher, nothing is captured
    _, _, err = run("check", "recipe.yaml", "objective=[]")
    assert err.endswith("recipe.yaml: valid recipe for no verb: it has no objective, train or evaluate; go\n")


def test_the_version(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"limbeck {metadata.version('limbeck')}\n")


def test_check_of_a_study(works, folder):
    study = {"name": "two", "base": "recipe.yaml", "arms": {"sft": {}, "long": {"train": {"steps": 9}}}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    found = works("check", "study.yaml")
    assert found["kind"] == "study" and set(found["arms"]) == {"sft", "long"}


@pytest.mark.parametrize("of", ["recipe", "study"])
def test_schema(run, of):
    code, out, err = run("schema", of)
    assert (code, err) == (0, "")
    assert json.loads(out)["title"].lower() == of


# ---- bad models and data: said when they are looked at


def train_refused(refused, *overrides, out="run"):
    message = refused("train", "recipe.yaml", *overrides, "--out", out, alone=False)
    assert not (Path(out) / "student").exists()
    return message


def model_copy(model_dir, name):
    return Path(shutil.copytree(model_dir, name))


def test_a_hub_model_that_cannot_be_had(refused):
    message = train_refused(refused, "student.model=owner/does-not-exist")
    assert message.startswith("tokenizer 'owner/does-not-exist' cannot be loaded; expected a folder saved by save_pretrained")


def test_a_hub_model_names_the_nearest_in_the_cache(refused, folder, model_dir):
    shutil.copytree(model_dir, folder / "cache" / "models" / "owner" / "tiny-model")
    assert "; did you mean 'owner/tiny-model'?" in train_refused(refused, "student.model=owner/tinymodel")


def test_a_model_without_weights(refused, model_dir):
    (model_copy(model_dir, "bare") / "model.safetensors").unlink()
    message = train_refused(refused, "student.model=bare")
    assert message.startswith("model 'bare' cannot be loaded") and "model.safetensors" in message


def test_corrupted_weights(refused, model_dir):
    file = model_copy(model_dir, "torn") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert train_refused(refused, "student.model=torn").startswith("model 'torn' cannot be loaded")
    file.write_bytes(b"\xff" * 64)
    assert train_refused(refused, "student.model=torn").startswith("model 'torn' cannot be loaded")


def test_weights_of_another_shape(refused, model_dir):
    file = model_copy(model_dir, "other") / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, file, {"format": "pt"})
    assert train_refused(refused, "student.model=other").startswith("model 'other' cannot be loaded")


def test_pickled_weights_are_refused_and_not_opened(refused, model_dir, folder):
    """A .bin file is a program: opening it runs what is in it."""
    copy = model_copy(model_dir, "pickled")
    (copy / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), copy / "pytorch_model.bin")
    assert train_refused(refused, "student.model=pickled").startswith("model 'pickled' cannot be loaded")

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(folder / "harm"),)

    torch.save({"model.norm.weight": Harm()}, copy / "pytorch_model.bin")
    assert train_refused(refused, "student.model=pickled").startswith("model 'pickled' cannot be loaded")
    assert not (folder / "harm").exists()


def test_code_in_a_model_folder_is_not_run(refused, model_dir, folder):
    copy = model_copy(model_dir, "coded")
    (copy / "harm.py").write_text(f"import os\nos.mkdir({str(folder / 'harm')!r})\nclass Model: ...\nclass Config: ...\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "harm", "auto_map": {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    message = train_refused(refused, "student.model=coded")
    assert "'coded' cannot be loaded" in message
    assert not (folder / "harm").exists()


def test_a_model_without_a_tokenizer(refused, model_dir):
    copy = model_copy(model_dir, "mute")
    for file in copy.glob("token*"):
        file.unlink()
    assert train_refused(refused, "student.model=mute").startswith("tokenizer 'mute' cannot be loaded")


def test_an_architecture_that_nobody_knows(refused, model_dir):
    copy = model_copy(model_dir, "alien")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "alien", "architectures": ["AlienForCausalLM"]}))
    assert "'alien' cannot be loaded" in train_refused(refused, "student.model=alien")


def test_tokenizers_that_differ(refused, folder):
    """Equal size, other meaning: distillation would run and teach nonsense."""
    other = make_tokenizer(["an altogether different text, from which other merges are learned", "zebra quiz jazz"], template=None)
    save_model(folder / "foreign", tiny_model(vocab=len(other)), other)
    for command in ("train", "capture"):
        arguments = ["teacher={type: model, model: foreign}", "objective.0.type=logits", "capture.path=store"]
        message = refused(command, "recipe.yaml", *arguments, alone=False)
        assert message.startswith("tokenizers of student and teacher differ: ")
        assert "to the student and" in message and "expected the same vocabulary" in message
    assert not Path("store").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.jsonl: found no rows, expected rows with `messages`"),
        ("\n\n", "data.jsonl: found no rows"),
        ('{"messages": [\n', "data.jsonl:1: not readable as JSON"),
        ('{"question": "a"}\n', "data.jsonl:1: found keys 'question', expected `messages`"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "data.jsonl:1: found no message of role 'assistant'"),
        ('{"messages": [{"role": "assistent", "content": "a"}]}\n', "data.jsonl:1: messages.0.role: found 'assistent', expected one of"),
        ('{"prompt": "a"}\n', "data.jsonl:1: `completion` is missing"),
    ],
)
def test_bad_data(refused, folder, content, message):
    (folder / "data.jsonl").write_text(content)
    assert train_refused(refused).startswith(message)


def test_data_without_a_scored_token(refused):
    message = train_refused(refused, "source.max_length=3")
    assert message.startswith(f"no token to learn in any of {len(ROWS)} rows at max_length 3, expected at least one; the longest has")


# ---- run directories


def test_the_directory_of_another_recipe(refused, works):
    works("train", "recipe.yaml", "--out", "run")
    assert refused("train", "recipe.yaml", "seed=3", "--out", "run") == (
        "run: holds a run of another recipe (seed is 0 there, 3 here); choose another run directory, or delete this one"
    )


def test_a_directory_that_is_no_run(refused, folder):
    (folder / "docs").mkdir()
    (folder / "docs" / "thesis.tex").write_text("mine")
    assert refused("train", "recipe.yaml", "--out", "docs") == "docs: exists and is no run directory; choose another path"
    assert os.listdir("docs") == ["thesis.tex"]
    assert refused("train", "recipe.yaml", "--out", "data.jsonl") == "data.jsonl: exists and is no run directory; choose another path"
    assert refused("train", "recipe.yaml", "--out", "data.jsonl/run").startswith("data.jsonl/run/recipe.json: could not be written")


def test_a_run_whose_recipe_is_broken(refused, folder):
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_text("{")
    assert refused("train", "recipe.yaml", "--out", "run").startswith("run/recipe.json: not readable as JSON")


# ---- other verbs


def test_a_capture_in_the_place_of_something_else(refused, folder, teacher_dir):
    teacher = f"teacher={{type: model, model: {teacher_dir}}}"
    assert refused("capture", "recipe.yaml", teacher, "--out", "data.jsonl").startswith("store 'data.jsonl': found a file, expected a new")
    (folder / "docs").mkdir()
    (folder / "docs" / "thesis.tex").write_text("mine")
    message = refused("capture", "recipe.yaml", teacher, "--out", "docs")
    assert message.startswith("store 'docs': found a folder with 'thesis.tex' and no manifest.json, expected a new folder")
    assert os.listdir("docs") == ["thesis.tex"]


def test_capturing_without_a_teacher_or_a_place(refused, teacher_dir):
    assert refused("capture", "recipe.yaml").startswith("capture: missing; expected a section with the `path`")
    assert refused("capture", "recipe.yaml", "--out", "x").startswith(
        "teacher.type: found 'none', expected one of 'distillkit', 'model', 'server'"
    )


def test_grading_with_nothing_or_nobody(refused, model_dir):
    assert refused("eval", model_dir, "--recipe", "recipe.yaml") == "recipe.yaml: evaluate is empty; expected at least one benchmark"
    benchmark = "evaluate=[{type: bits_per_byte, data: data.jsonl}]"
    assert refused("eval", "./nobody", benchmark, "--recipe", "recipe.yaml").startswith("model './nobody': no such folder")
    assert refused("eval", model_dir, "--recipe", "recpie.yaml").endswith("did you mean 'recipe.yaml'?")


@pytest.mark.parametrize("path", ["nowhere", ".", "data.jsonl"])
def test_a_report_of_nothing(refused, path):
    message = refused("report", path)
    assert message.startswith(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "study.yaml: arms: found no arm"),
        ({"arms": {"a": {"trian": {}}}}, "study.yaml: arm 'a': trian: unknown key; did you mean 'train'?"),
        ({"arms": {"../a": {}}}, "study.yaml: arms: found arm '../a'"),
        ({"arms": {"a": {"seed": 3}}}, "study.yaml: arms: arm 'a' sets 'seed'"),
        ({"seeds": []}, "study.yaml: seeds: found []"),
        ({"base": "recpie.yaml"}, "recpie.yaml: no such file or directory; did you mean 'recipe.yaml'?"),
        ({"sedes": [1]}, "study.yaml: sedes: unknown key; did you mean 'seeds'?"),
    ],
)
def test_bad_studies(refused, folder, change, message):
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": "s", "base": "recipe.yaml", "arms": {"sft": {}}} | change))
    assert refused("study", "study.yaml").startswith(message)
    assert refused("check", "study.yaml").startswith(message)


# ---- the walk


def test_capture_then_train_from_it_then_report(run, works, folder, teacher_dir):
    """Every verb once, on one recipe, through the command line."""
    teacher = f"teacher={{type: model, model: {teacher_dir}}}"
    objective = "objective=[{type: ce, weight: 0.5}, {type: logits, temperature: 2}, {type: hidden, pairs: [[1, 0], [3, 2]]}]"
    benchmarks = "evaluate=[{type: agreement, data: data.jsonl}, {type: bits_per_byte, data: data.jsonl}]"
    captured = works("capture", "recipe.yaml", teacher, objective, benchmarks, "--out", "store")
    assert captured["store"] == "store" and captured["samples"] == len(ROWS) and captured["layers"] == [0, 2]
    assert captured == works("capture", "recipe.yaml", teacher, objective, benchmarks, "--out", "store")

    stored = works("train", "recipe.yaml", "teacher={type: store, path: store}", objective, benchmarks, "--out", "stored")
    live = works("train", "recipe.yaml", teacher, objective, benchmarks, "--out", "live")
    assert (stored["run"], stored["status"], stored["steps"]) == ("stored", "finished", 2)
    assert stored["evals"]["agreement"]["kl"]["value"] == pytest.approx(live["evals"]["agreement"]["kl"]["value"], rel=1e-4)
    losses = [[row["loss"] for row in limbeck.Run(Path(path)).metrics()] for path in ("stored", "live")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    graded = works("eval", "stored/student", benchmarks, teacher, "--recipe", "recipe.yaml", "--out", "graded")
    assert graded["evals"]["agreement"]["kl"]["value"] == pytest.approx(live["evals"]["agreement"]["kl"]["value"], rel=1e-4)
    assert Path("graded/evals/agreement.json").is_file()

    written = works("report", "stored")
    assert all(Path(written[kind]).is_file() for kind in ("html", "markdown", "json"))
    code, out, err = run("train", "recipe.yaml", teacher, objective, benchmarks, "--out", "live")
    assert (code, out) == (0, "") and "live: already finished with this recipe" in err


def test_a_store_is_inspected_verified_and_repaired(run, works, refused, teacher_dir):
    capture = ["recipe.yaml", f"teacher={{type: model, model: {teacher_dir}}}", "capture.samples_per_shard=2", "capture.batch_size=2"]
    works("capture", *capture, "--out", "store")
    found = works("store", "inspect", "store")
    assert (found["complete"], found["num_samples"], found["num_shards"], found["codec"]) == (True, len(ROWS), 3, {"type": "exact"})
    assert found["bytes"] == sum(file.stat().st_size for file in Path("store").iterdir())
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / found["num_scored"])
    code, out, err = run("store", "inspect", "store")
    assert (code, out) == (0, "") and "exact, serves every temperature" in err and "5 conversations" in err
    assert works("store", "verify", "store") == {
        "store": "store",
        "shards": 3,
        "bytes": found["bytes"] - Path("store/manifest.json").stat().st_size,
    }
    shard = Path("store/shard-00001.parquet")
    content = shard.read_bytes()
    shard.write_bytes(content[:50] + b"!" + content[51:])
    assert refused("store", "verify", "store").startswith("store/shard-00001.parquet: found SHA-256 ")
    assert works("store", "repair", *capture, "--out", "store")["repaired"] == ["shard-00001.parquet"]
    assert shard.read_bytes() == content and works("store", "repair", *capture, "--out", "store")["repaired"] == []
    for verb in ("inspect", "verify"):
        assert (
            refused("store", verb, "nowhere") == "store 'nowhere': found no manifest.json, expected a folder written by `limbeck capture`"
        )
    assert refused("store", "repair", *capture, "--out", "new").startswith("store 'new': found no manifest.json")


def test_a_capture_with_a_target_is_chosen_shown_and_measured(run, works, refused, teacher_dir):
    pytest.importorskip("matplotlib")
    recipe = ["recipe.yaml", f"teacher={{type: model, model: {teacher_dir}}}", "capture.calibrate_on=2"]
    code, out, err = run("capture", *recipe, "--target-kl", "0.05", "--out", "store")
    assert (code, out) == (0, "") and "store: chose quantized with bytes_per_token = " in err
    assert works("capture", *recipe, "--target-kl", "0.05", "--out", "store")["codec"]["type"] == "quantized"
    assert "found both target_kl and bytes_per_token" in refused(
        "capture", *recipe, "--target-kl", "1", "--bytes-per-token", "9", "--out", "a"
    )
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        code, out, err = run("store", "inspect", "store", "--plot", f"plot.{kind}")
        assert code == 0 and "KL, by how sure" in err and "█" in err
        assert Path(f"plot.{kind}").read_bytes().startswith(start)
    assert refused("store", "inspect", "store", "--plot", "plot.gif").startswith("--plot: found 'plot.gif', expected a file that ends with")
    found = works("store", "verify", "store", recipe[1], "--recipe", "recipe.yaml", "--measure", "3")
    assert 0 < found["measured"]["kl"] < 0.5 and found["measured"]["num_samples"] <= 3


def test_a_store_that_lacks_what_a_recipe_asks_for(refused, works, teacher_dir):
    works("capture", "recipe.yaml", f"teacher={{type: model, model: {teacher_dir}}}", "source.limit=3", "--out", "store")
    store = ["teacher={type: store, path: store}", "objective=[{type: logits}]"]
    message = train_refused(refused, *store)
    assert message.startswith("store 'store': lacks ") and "Capture again" in message
    assert "hidden states, and teacher type 'store' gives none" in train_refused(refused, store[0], "objective=[{type: hidden}]")


def test_a_store_made_with_another_tokenizer(refused, works, folder, teacher_dir, model_dir):
    works("capture", "recipe.yaml", f"teacher={{type: model, model: {teacher_dir}}}", "--out", "store")
    other = make_tokenizer()
    other.add_tokens(["something-new"])
    save_model(folder / "other", tiny_model(vocab=len(other)), other)
    message = train_refused(refused, "teacher={type: store, path: store}", "objective=[{type: logits}]", "student.model=other")
    assert message.startswith("store 'store': captured with vocabulary_hash ")


def test_the_run_is_named_after_the_recipe_where_no_place_is_given(works):
    assert works("train", "recipe.yaml")["run"] == "runs/recipe"


def test_an_interrupt_says_how_to_go_on(run, works, monkeypatch):
    trainer, count = importlib.import_module("limbeck.trainer"), 0
    step = trainer.optimizer_step

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    command = ["train", "recipe.yaml", "train.steps=5", "train.checkpoint_every=2", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", interrupted)
        code, out, err = run(*command)
    assert (code, out) == (75, "") and err.endswith("stopped; start the same command again to go on from what was written\n")
    code, out, err = run(*command)
    assert code == 0 and "run: resuming after step 2 of 5" in err


def test_a_run_without_memory_says_what_to_set_and_goes_on_with_it(run, monkeypatch):
    trainer, count = importlib.import_module("limbeck.trainer"), 0
    step = trainer.optimizer_step

    def greedy(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            torch.empty(2**58)
        return step(*arguments)

    command = ["train", "recipe.yaml", "train.steps=5", "train.checkpoint_every=2", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", greedy)
        code, out, err = run(*command, "train.micro_batch_size=2")
    assert (code, out) == (2, "") and "error: out of memory (" in err and "Set train.micro_batch_size=1" in err and "Traceback" not in err
    code, out, err = run(*command, "train.micro_batch_size=1", "train.gradient_checkpointing=true")
    assert code == 0 and "run: resuming after step 2 of 5" in err
    assert json.loads(Path("run/recipe.json").read_text())["train"]["micro_batch_size"] == 1


def test_an_error_of_ours_is_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["limbeck", "train", "recipe.yaml", "--out", "run"])
    monkeypatch.setattr(importlib.import_module("limbeck.trainer"), "train", lambda *_: (_ for _ in ()).throw(RuntimeError("defect")))
    with pytest.raises(RuntimeError, match="defect"):
        cli.main()


# ---- the same from Python


def test_the_api_is_functions_whatever_was_imported_before():
    """`limbeck.capture` is a function and a module's name; importing the module must not hide the function."""
    for name in ("capture", "check", "demo"):
        module = importlib.import_module(f"limbeck.{name}")
        for _ in range(2):
            assert getattr(limbeck, name) is getattr(module, name)
    assert not [name for name in limbeck.__all__ if isinstance(getattr(limbeck, name), ModuleType)]


def test_the_api_names_what_it_does_not_have():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = limbeck.trian
