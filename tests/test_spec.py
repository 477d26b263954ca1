"""Specs: what a YAML file may say, and what its author is told when it says something else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from limbeck.errors import RecipeError
from limbeck.spec import Family, Spec, load_yaml, member_of, merge, override, validate


class Shape(Family):
    type: str
    scale: float = Field(1.0, gt=0)
    """How large it is drawn."""


class Corner(Spec):
    x: float = 0.0
    y: float = 0.0


class Circle(Shape):
    type: Literal["circle"] = "circle"
    radius: float = 1.0


class Polygon(Shape):
    type: Literal["polygon"] = "polygon"
    corners: list[Corner] = []
    style: Literal["dashed", "dotted", "solid"] = "solid"
    pairs: Literal["all"] | list[tuple[int, int]] = "all"


class Colour(Family):
    type: str


class Red(Colour):
    type: Literal["red"] = "red"


class Pen(Spec):
    width: int = Field(1, gt=0)
    rate: float | None = 1e-3
    dry: bool = False


class Drawing(Spec):
    shape: member_of(Shape)
    layers: list[member_of(Shape)] = []
    named: dict[str, Annotated[Pen, Field()]] = {}
    pen: Pen | None = None
    names: str | list[str] = "none"
    ids: list[int] = []


def refused(tree, cls=Drawing):
    with pytest.raises(RecipeError) as caught:
        validate(cls, {"shape": {"type": "circle"}, **tree}, "file.yaml")
    message = str(caught.value)
    assert message.startswith("file.yaml: ")
    return message.removeprefix("file.yaml: ")


# ---- families


def test_a_family_knows_its_own_members_only():
    assert Shape.members == {"circle": Circle, "polygon": Polygon}
    assert Colour.members == {"red": Red}


def test_a_subclass_without_a_type_of_its_own_does_not_take_its_parents_place():
    class Wheel(Circle):
        spokes: int = 8

    assert Shape.members["circle"] is Circle
    assert validate(Drawing, {"shape": {"type": "circle"}}, "x").shape == Circle()
    assert Drawing(shape=Wheel()).shape == Wheel()


def test_two_members_of_one_type_are_refused():
    """Else a plugin would silently stand in for what a recipe means."""
    with pytest.raises(TypeError, match=r"Disc: type 'circle' is taken by .*\.Circle"):

        class Disc(Shape):
            type: Literal["circle"] = "circle"

    assert Shape.members["circle"] is Circle


def test_a_member_is_chosen_by_its_type():
    drawing = validate(Drawing, {"shape": {"type": "polygon", "corners": [{"x": 1}]}, "layers": [{"type": "circle", "radius": 2}]}, "here")
    assert drawing.shape == Polygon(corners=[Corner(x=1)])
    assert drawing.layers == [Circle(radius=2)]


def test_a_member_that_is_parsed_already_is_taken_as_it_is():
    circle = Circle(radius=3)
    assert Drawing(shape=circle).shape is circle


def test_unknown_type_names_the_nearest_and_all():
    assert refused({"layers": [{"type": "circle"}, {"type": "cirlce"}]}) == (
        "layers.1: found type 'cirlce', expected one of: circle, polygon; did you mean 'circle'?"
    )
    assert refused({"shape": {"type": "sphere"}}) == "shape: found type 'sphere', expected one of: circle, polygon"


@pytest.mark.parametrize("tree", [{"radius": 1}, {"type": None}, {}])
def test_no_type(tree):
    assert refused({"shape": tree}) == "shape: found no `type`, expected one of: circle, polygon"


def test_a_missing_type_is_not_taken_for_the_type_none():
    class Kind(Family):
        type: str

    class NoKind(Kind):
        type: Literal["none"] = "none"

    class Holder(Spec):
        kind: member_of(Kind)

    with pytest.raises(RecipeError, match=r"found no `type`, expected one of: none$"):
        validate(Holder, {"kind": {}}, "x")


@pytest.mark.parametrize("value", ["circle", 3, ["circle"], None])
def test_a_member_must_be_a_mapping(value):
    assert "expected a mapping with a `type` (one of: circle, polygon)" in refused({"shape": value})


def test_a_type_that_is_no_text():
    assert refused({"shape": {"type": ["circle"]}}).startswith("shape: found type ['circle'], expected one of")


# ---- keys


def test_unknown_keys_come_with_their_path_and_the_nearest_key():
    assert refused({"shpe": 1}) == "shpe: unknown key; did you mean 'shape'?"
    assert refused({"pen": {"widht": 1}}) == "pen.widht: unknown key; did you mean 'width'?"
    assert refused({"shape": {"type": "circle", "raduis": 1}}) == "shape.raduis: unknown key; did you mean 'radius'?"
    assert refused({"layers": [{"type": "circle", "raduis": 1}]}) == "layers.0.raduis: unknown key; did you mean 'radius'?"
    assert refused({"named": {"fine": {"widht": 1}}}) == "named.fine.widht: unknown key; did you mean 'width'?"
    nested = {"layers": [{"type": "circle"}, {"type": "polygon", "corners": [{}, {"xx": 1}]}]}
    assert refused(nested) == "layers.1.corners.1.xx: unknown key; did you mean 'x'?"


def test_the_nearest_key_is_one_of_the_member_that_type_names():
    assert refused({"shape": {"type": "polygon", "radius": 1}}) == (
        "shape.radius: unknown key; known keys: type, scale, corners, style, pairs"
    )


def test_missing_key():
    with pytest.raises(RecipeError, match=r"^x: shape: missing; expected a value$"):
        validate(Drawing, {}, "x")


def test_all_problems_are_listed_at_once():
    message = refused({"shpe": 1, "pen": {"width": 0, "dry": "perhaps"}})
    assert [line.split(":")[0].strip() for line in message.strip().splitlines()] == ["pen.width", "pen.dry", "shpe"]


def test_keys_that_are_no_text():
    with pytest.raises(RecipeError, match="found 1, keys should be strings"):
        validate(Drawing, {1: 2, "shape": {"type": "circle"}}, "x")


@pytest.mark.parametrize("tree", [None, [], "text", 3])
def test_a_spec_is_a_mapping(tree):
    with pytest.raises(RecipeError, match=r"^x: found .*, expected a mapping of keys to values$"):
        validate(Drawing, tree, "x")


# ---- values


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"pen": {"width": 1.5}}, "pen.width: found 1.5, expected a valid integer, got a number with a fractional part"),
        ({"pen": {"width": "wide"}}, "pen.width: found 'wide', expected a valid integer, unable to parse string as an integer"),
        ({"pen": {"width": 0}}, "pen.width: found 0, expected a number greater than 0"),
        ({"pen": {"width": [1]}}, "pen.width: found [1], expected a valid integer"),
        ({"pen": {"rate": float("nan")}}, "pen.rate: found nan, expected a finite number"),
        ({"pen": {"rate": float("inf")}}, "pen.rate: found inf, expected a finite number"),
        ({"pen": 3}, "pen: found 3, expected a mapping of keys to values"),
        ({"layers": {"type": "circle"}}, "layers: found {'type': 'circle'}, expected a valid list"),
        ({"layers": [{"type": "circle", "scale": -1}]}, "layers.0.scale: found -1, expected a number greater than 0"),
        (
            {"shape": {"type": "polygon", "style": "dashd"}},
            "shape.style: found 'dashd', expected 'dashed', 'dotted' or 'solid'; did you mean 'dashed'?",
        ),
    ],
)
def test_wrong_values(tree, message):
    assert refused(tree) == message


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"names": 5}, "names: found 5, expected a valid string or a valid list"),
        ({"names": ["a", 5]}, "names.1: found 5, expected a valid string"),
        ({"shape": {"type": "polygon", "pairs": 5}}, "shape.pairs: found 5, expected 'all' or a valid list"),
        ({"shape": {"type": "polygon", "pairs": [[0, 1], [0, "x"]]}}, "shape.pairs.1.1: found 'x', expected a valid integer, unable to"),
        ({"shape": {"type": "polygon", "pairs": [[0]]}}, "shape.pairs.0.1: missing; expected a value"),
    ],
)
def test_one_of_several_kinds_of_value_gives_one_line_with_the_key_as_it_is_written(tree, message):
    found = refused(tree)
    assert found.startswith(message)
    assert "\n" not in found


def test_a_number_that_yaml_takes_for_text():
    """PyYAML reads `1e-4` (no dot) as a string."""
    assert load_yaml_text("a: 1e-4") == {"a": "1e-4"}
    pen = validate(Pen, {"rate": "1e-4", "width": "3"}, "x")
    assert (pen.rate, pen.width) == (1e-4, 3)


@pytest.mark.parametrize("tree", [{"width": True}, {"rate": True}, {"rate": False}])
def test_a_truth_value_is_no_number(tree):
    (key, value), *_ = tree.items()
    assert refused({"pen": tree}) == f"pen.{key}: found {value}, expected a number"


def test_truth_values_where_they_belong():
    assert validate(Pen, {"dry": True}, "x").dry is True
    assert validate(Drawing, {"shape": {"type": "circle"}, "names": ["a"]}, "x").names == ["a"]


def test_a_spec_cannot_be_changed():
    pen = Pen()
    with pytest.raises(ValidationError, match="frozen"):
        pen.width = 2


# ---- YAML


def load_yaml_text(text, *overrides):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_yaml(file, overrides)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['echo harm']",
        "!!python/name:os.system",
        "a: [1, 2",
        "a: 'open",
        "a: b: c",
        "\ta: 1",
        "a: *nowhere",
        "a: 2024-13-45",
        "a: &a [*a]",
        "a: " + "[" * 400,
        "a: {? [1]: 2}",
        "---\na: 1\n---\nb: 2",
        b"\xff\xfe\x00",
        b"a: \x00",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_yaml_that_cannot_be_read(text):
    with pytest.raises(RecipeError, match=r"recipe\.yaml: (not readable as|found .*, expected a mapping)") as caught:
        load_yaml_text(text)
    assert "\n" not in str(caught.value)


def test_an_unsafe_tag_runs_nothing(tmp_path):
    with pytest.raises(RecipeError, match="could not determine a constructor for the tag"):
        load_yaml_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path}/harm']")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("text", ["", "# nothing", "- a\n- b", "text", "3"])
def test_yaml_that_is_no_mapping(text):
    with pytest.raises(RecipeError, match="expected a mapping of keys to values"):
        load_yaml_text(text)


def test_a_key_given_twice_is_refused():
    """YAML would take the second section and forget the first."""
    with pytest.raises(RecipeError, match=r"found the key 'steps' twice \(line 4, column 3\)"):
        load_yaml_text("train:\n  steps: 1\n  batch_size: 2\n  steps: 3\n")


def test_anchors_and_merge_keys_work():
    tree = load_yaml_text("base: &base {a: 1, b: 2}\nx: {<<: *base, b: 3}\ny: *base\n")
    assert tree == {"base": {"a": 1, "b": 2}, "x": {"a": 1, "b": 3}, "y": {"a": 1, "b": 2}}


def test_an_override_of_an_alias_leaves_its_anchor_alone():
    assert load_yaml_text("a: &a {k: 1}\nb: *a\n", "b.k=2") == {"a": {"k": 1}, "b": {"k": 2}}


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: 1")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(RecipeError, match=r"recpie\.yaml: no such file or directory; did you mean 'recipe\.yaml'\?$"):
        load_yaml(tmp_path / "recpie.yaml")
    with pytest.raises(RecipeError, match=r"no such file or directory$"):
        load_yaml(tmp_path / "no" / "recipe.yaml")


def test_a_folder_and_a_name_too_long_are_no_recipes(tmp_path):
    with pytest.raises(RecipeError, match="is a directory"):
        load_yaml(tmp_path)
    with pytest.raises(RecipeError, match="file name too long"):
        load_yaml(tmp_path / ("a" * 300))
    with pytest.raises(RecipeError, match="embedded null byte"):
        load_yaml(tmp_path / "a\0b")


def test_a_byte_order_mark_and_crlf_are_fine():
    assert load_yaml_text(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


# ---- overrides

TREE = {"train": {"steps": 3, "optimizer": {"rate": 1}}, "objective": [{"type": "ce"}, {"type": "logits", "weight": 1}], "seed": 0}


@pytest.mark.parametrize(
    ("pair", "path", "value"),
    [
        ("train.steps=4", ("train", "steps"), 4),
        ("train.optimizer.rate=0.5", ("train", "optimizer", "rate"), 0.5),
        ("train.optimizer.rate=1e-4", ("train", "optimizer", "rate"), "1e-4"),
        ("objective.1.weight=0", ("objective", 1, "weight"), 0),
        ("objective.0={type: hidden, pairs: [[0, 1]]}", ("objective", 0), {"type": "hidden", "pairs": [[0, 1]]}),
        ("capture.path=store", ("capture", "path"), "store"),
        ("a.b.c=d", ("a", "b", "c"), "d"),
        ("train=null", ("train",), None),
        ("train.steps=", ("train", "steps"), None),
        ("name=a=b", ("name",), "a=b"),
        ("name='3'", ("name",), "3"),
        ("evaluate=[]", ("evaluate",), []),
    ],
)
def test_override(pair, path, value):
    found = override(TREE, [pair])
    for part in path:
        found = found[part]
    assert found == value


def test_overrides_apply_in_order_and_leave_the_original_alone():
    before = repr(TREE)
    assert override(TREE, ["train.steps=4", "objective.0.weight=2", "train.steps=5"])["train"]["steps"] == 5
    assert repr(TREE) == before


def test_an_override_below_null_makes_a_section():
    assert override({"capture": None}, ["capture.path=x"]) == {"capture": {"path": "x"}}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("train.steps", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("train..steps=3", "expected key.path=value"),
        (".train=3", "expected key.path=value"),
        ("train.=3", "expected key.path=value"),
        ("seed.x=3", "seed is 0, which has no keys"),
        ("seed.x.y=3", "'x' is below 0, which has no keys"),
        ("objective.2.weight=3", "found index '2', expected a number from 0 to 1"),
        ("objective.-1.weight=3", "found index '-1', expected a number from 0 to 1"),
        ("objective.ce.weight=3", "found index 'ce', expected a number from 0 to 1"),
        ("objective.²={}", "found index '²', expected a number from 0 to 1"),
        ("empty.0=1", "found index '0', expected no index: the list is empty"),
        ("train.steps=[1", "not readable as YAML"),
        ("train.steps=!!python/name:os.system x", "not readable as YAML"),
        ("train.steps={a: 1, a: 2}", "found the key 'a' twice"),
        ("train.steps=2024-13-45", "not readable as YAML: month must be in 1..12"),
    ],
)
def test_bad_overrides_are_named(pair, message):
    with pytest.raises(RecipeError) as caught:
        override({**TREE, "empty": []}, [pair])
    assert str(caught.value).startswith(f"override {pair!r}: ")
    assert message in str(caught.value)


def test_an_override_ends_up_in_the_message_under_its_key(tmp_path):
    file = tmp_path / "drawing.yaml"
    file.write_text("shape: {type: circle}")
    with pytest.raises(RecipeError, match=r"drawing\.yaml: pen\.width: found 'x'"):
        validate(Drawing, load_yaml(file, ["pen.width=x"]), str(file))


# ---- merge


def test_merge_goes_into_mappings_and_replaces_all_else():
    base = {"train": {"steps": 1, "optimizer": {"rate": 1, "betas": [1, 2]}}, "list": [1, 2]}
    merged = merge(base, {"train": {"optimizer": {"betas": [3]}}, "list": [9], "new": {"a": 1}})
    assert merged == {"train": {"steps": 1, "optimizer": {"rate": 1, "betas": [3]}}, "list": [9], "new": {"a": 1}}
    assert base["train"]["optimizer"]["betas"] == [1, 2]


def test_merge_replaces_a_member_by_one_of_another_type():
    base = {"teacher": {"type": "model", "model": "a"}}
    assert merge(base, {"teacher": {"type": "store", "path": "p"}}) == {"teacher": {"type": "store", "path": "p"}}
    assert merge(base, {"teacher": {"type": "model", "dtype": "bfloat16"}})["teacher"]["model"] == "a"
    assert merge(base, {"teacher": {"dtype": "bfloat16"}})["teacher"] == {"type": "model", "model": "a", "dtype": "bfloat16"}


def test_merge_shares_nothing_with_its_inputs():
    base, changes = {"a": {"b": [1]}}, {"c": {"d": [2]}}
    merged = merge(base, changes)
    merged["a"]["b"].append(3)
    merged["c"]["d"].append(3)
    assert (base, changes) == ({"a": {"b": [1]}}, {"c": {"d": [2]}})


# ---- schema


def test_schema_tells_members_apart_by_type_and_carries_the_docstrings():
    schema = Drawing.model_json_schema()
    shape = schema["properties"]["shape"]
    assert shape["discriminator"] == {"propertyName": "type", "mapping": {"circle": "#/$defs/Circle", "polygon": "#/$defs/Polygon"}}
    assert shape["oneOf"] == schema["properties"]["layers"]["items"]["oneOf"] == [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Polygon"}]
    assert schema["$defs"]["Circle"]["properties"]["scale"]["description"] == "How large it is drawn."
    assert schema["additionalProperties"] is False


def test_schema_of_families_with_one_member_and_with_none():
    class Empty(Family):
        type: str

    class Holder(Spec):
        colour: member_of(Colour)
        nothing: member_of(Empty) = None

    properties = Holder.model_json_schema()["properties"]
    assert properties["colour"]["oneOf"] == [{"$ref": "#/$defs/Red"}]
    assert properties["nothing"]["type"] == "object"


def test_round_trip_through_json():
    drawing = validate(Drawing, {"shape": {"type": "polygon", "corners": [{"x": 1}]}, "layers": [{"type": "circle"}], "pen": {}}, "x")
    assert Drawing.model_validate_json(drawing.model_dump_json()) == drawing
    assert drawing.model_dump(mode="json")["shape"]["corners"] == [{"x": 1.0, "y": 0.0}]
