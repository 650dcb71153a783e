"""Recipes and target profiles: what is refused, and how it is said."""

import json
import tomllib
from pathlib import Path

import pytest

from toolchain.errors import RecipeError
from toolchain.recipe import Recipe, read_recipe
from toolchain.target import read_target, targets
from toolchain.template import recipe_template

MINIMAL = """
name = "tiny"
[teacher]
model = "teacher"
[data]
train = "train.jsonl"
held_out = "held_out.jsonl"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "held_out.jsonl").write_text("")
    return tmp_path


def recipe_with(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def refused(path: Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    return caught.value


def test_a_minimal_recipe_takes_every_default_and_finds_paths_beside_itself(folder: Path) -> None:
    recipe = read_recipe(recipe_with(folder, MINIMAL))
    assert recipe.teacher.model == folder / "teacher"
    assert recipe.distill.temperature == 2.0
    assert recipe.distill.lora_rank == 16
    assert recipe.capture_temperatures == (2.0,)


def test_an_unknown_key_is_named_with_its_table_and_the_nearest_known_key(folder: Path) -> None:
    error = refused(recipe_with(folder, MINIMAL + "[distill]\ntemprature = 3.0\n"))
    assert "distill: unknown key 'temprature'" in error.message
    assert error.hint is not None
    assert "did you mean 'temperature'?" in error.hint
    assert "learning_rate" in error.hint


def test_an_unknown_table_is_named(folder: Path) -> None:
    error = refused(recipe_with(folder, MINIMAL + "[distil]\ntemperature = 3.0\n"))
    assert "unknown key 'distil'" in error.message
    assert "did you mean 'distill'?" in str(error.hint)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('[distill]\nepochs = "3"', "distill.epochs"),
        ("[distill]\ntemperature = 0", "distill.temperature"),
        ("[distill]\ntemperature = nan", "distill.temperature"),
        ("[distill]\nbatch_size = 2.5", "distill.batch_size"),
        ("[distill]\nbatch_size = true", "distill.batch_size"),
        ("[distill]\nlora_dropout = 1.0", "distill.lora_dropout"),
        ("[distill]\nce_weight = 0\nkl_weight = 0", "distill: ce_weight and kl_weight are both 0"),
        ("[capture]\ntop_k = 0", "capture.top_k"),
        ("[capture]\ntop_p = 1.5", "capture.top_p"),
        ("[capture]\ntemperatures = [1.0, 4.0]", "not among capture.temperatures"),
        ("[student]\nkeep_layers = []", "student: keep_layers is empty"),
        ("[student]\nkeep_layers = [0, 2, 1]", "must rise"),
        ("[student]\nkeep_layers = [-1, 2]", "student.keep_layers"),
        ('[student]\nmodel = "nowhere"', "student.model: no such file or folder"),
        ('[quantize]\nfile_type = "Q4_K_XL"', "quantize.file_type"),
        ('[merge]\ndtype = "bfloat16"', "merge.dtype"),
        ("[generate]\nmax_new_tokens = 0", "generate.max_new_tokens"),
        ("[bench]\ngenerated_tokens = 1", "bench.generated_tokens"),
        (
            "[bench]\nprompt_tokens = 4000",
            "bench.prompt_tokens + bench.generated_tokens is 4128, bundle.context is 2048",
        ),
        ('[bundle]\ntargets = ["X 86"]', "bundle.targets.0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_the_path_of_its_key(folder: Path, line: str, says: str) -> None:
    assert says in refused(recipe_with(folder, MINIMAL + line + "\n")).message


def test_a_missing_key_and_a_missing_file_are_named(folder: Path) -> None:
    assert "teacher.model: is missing" in refused(recipe_with(folder, MINIMAL.replace('model = "teacher"', ""))).message
    (folder / "train.jsonl").unlink()
    error = refused(recipe_with(folder, MINIMAL))
    assert "data.train: no such file" in error.message
    assert str(folder / "train.jsonl") in error.message


def test_every_problem_of_a_recipe_is_listed_at_once(folder: Path) -> None:
    message = refused(recipe_with(folder, MINIMAL + "[distill]\nepoch = 3\nbatch_size = 0\n")).message
    assert "unknown key 'epoch'" in message
    assert "distill.batch_size" in message


def test_files_that_are_not_recipes_are_refused_in_one_message(folder: Path, tmp_path: Path) -> None:
    assert "not valid TOML" in refused(recipe_with(folder, "name = ")).message
    (folder / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    assert "not UTF-8" in refused(folder / "latin.toml").message
    assert "no such file" in refused(folder / "none.toml").message
    assert "is a folder" in refused(folder).message
    assert "is not used here" in refused(recipe_with(folder, MINIMAL + "[bench]\nrepetitions = 2020-01-01\n")).message


def test_overrides_reach_nested_keys_and_are_checked_alike(folder: Path) -> None:
    path = recipe_with(folder, MINIMAL)
    assert read_recipe(path, {"distill.epochs": 7}).distill.epochs == 7
    with pytest.raises(RecipeError, match="unknown key 'epohcs'"):
        read_recipe(path, {"distill.epohcs": 7})
    with pytest.raises(RecipeError, match="'name' is not a table"):
        read_recipe(path, {"name.first": 1})


def test_the_recipe_that_init_writes_is_valid_and_names_every_key(folder: Path) -> None:
    text = recipe_template().replace('"models/teacher"', '"teacher"').replace('"data/', '"')
    assert read_recipe(recipe_with(folder, text)) == read_recipe(
        recipe_with(folder, MINIMAL.replace('"tiny"', '"my-model"'))
    )
    for name, field in Recipe.model_fields.items():
        model = field.annotation
        assert name in text
        for key in getattr(model, "model_fields", {}):
            assert f"{key} = " in text, f"{name}.{key}"


def test_the_commented_defaults_of_init_are_the_defaults(folder: Path) -> None:
    """Uncommenting every `# key = value` line that has a default changes nothing."""
    lines = recipe_template().replace('"models/teacher"', '"teacher"').replace('"data/', '"').splitlines()
    examples = ("sha256", "special_tokens", "# model = ", "keep_layers", "system", "temperatures")
    live = [
        line[2:] if line.startswith("# ") and " = " in line and not any(word in line for word in examples) else line
        for line in lines
    ]
    live = [line for line in live if _is_toml(line)]
    assert len([line for line in live if " = " in line]) > 40
    assert read_recipe(recipe_with(folder, "\n".join(live))) == read_recipe(
        recipe_with(folder, MINIMAL.replace('"tiny"', '"my-model"'))
    )


def _is_toml(line: str) -> bool:
    try:
        tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return False
    return True


def test_the_demo_recipe_is_a_recipe() -> None:
    raw = tomllib.loads((Path(__file__).parents[2] / "recipes" / "demo.toml").read_text())
    assert Recipe.model_validate_json(json.dumps(raw)).evaluate.max_kl_ratio == 0.5


def test_the_json_schema_describes_every_table() -> None:
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "Autocast" in json.dumps(schema)


@pytest.mark.parametrize("name", sorted(targets()))
def test_every_target_loads(name: str) -> None:
    assert read_target(name).name == name


def test_the_sweep_found_the_targets() -> None:
    assert "x86-cpu" in targets()


def test_an_unknown_target_names_those_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        read_target("vax")
    assert "x86-cpu" in str(caught.value.hint)
