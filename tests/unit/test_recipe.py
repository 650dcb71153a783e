"""Recipes and target profiles: what is refused, and how it is said."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from toolchain.errors import HostError, RecipeError
from toolchain.recipe import Recipe, read_recipe
from toolchain.settings import _models_in, without_operational
from toolchain.target import read_target, targets
from toolchain.template import _OPTIONAL, recipe_template

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
        ("[distill]\nce_weight = 0\nkl_weight = 0", "distill: ce_weight is 0 and there is no other loss"),
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
        ('[bundle]\nforms = ["folder"]', "bundle.forms.0"),
        ('[bundle]\nforms = ["archive", "archive"]', "bundle: forms: each one once"),
        ('[bundle]\nforms = ["image"]', "bundle: forms has 'image', and base is missing: `toolchain base"),
        ('[bundle.base]\nx86_64 = "train.jsonl"', "bundle: base is for images"),
        ('[bundle]\nforms = ["image"]\nbase.x86_64 = "no.tar"', "bundle.base.x86_64"),
        ("[generate]\ncandidates = 4", "generate: candidates above 1 needs a sampling_temperature above 0"),
        (
            '[generate]\ncandidates = 4\nsampling_temperature = 1.0\nanswers = "dataset"',
            "generate: candidates above 1 needs answers = 'teacher'",
        ),
        (
            "[generate]\ncandidates = 4\nsampling_temperature = 1.0",
            "generate.candidates above 1 needs select.embedding_model",
        ),
        ('[generate]\ntruncated = "drop"', "generate: unknown key 'truncated'"),
        ('[select]\ntruncated = "cut"', "select.truncated"),
        ("[select]\nmin_answer_tokens = 0", "select.min_answer_tokens"),
        ("[select]\nmin_answer_tokens = 9\nmax_answer_tokens = 8", "select: max_answer_tokens is below"),
        ('[select]\nduplicates = "merge"', "select.duplicates"),
        ('[select]\nembedding_model = "nowhere"', "select.embedding_model: no such file or folder"),
        ("[on_policy]\nsteps = -1", "on_policy.steps"),
        ("[on_policy]\nstudent_share = 1.5", "on_policy.student_share"),
        ("[compare]\nquestions = 0", "compare.questions"),
        ('[compare]\nout_of_domain = "nowhere"', "compare.out_of_domain: no such file or folder"),
        ('[distill]\nmethod = "answers"\nce_weight = 0', "distill: ce_weight is 0"),
        ('[distill]\ndivergence = "kl"', "distill.divergence"),
        ("[distill]\njsd_beta = 1.0", "distill.jsd_beta"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_the_path_of_its_key(folder: Path, line: str, says: str) -> None:
    assert says in refused(recipe_with(folder, MINIMAL + line + "\n")).message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('engine = "llama.cpp"', "teacher: engine 'llama.cpp' needs a .gguf file as model"),
        (
            'engine = "llama.cpp"\nmodel = "teacher.gguf"\nload_in_4bit = true',
            "teacher: load_in_4bit is for Transformers",
        ),
        ('engine = "llama.cpp"\nmodel = "teacher.gguf"', "student.model is missing: a .gguf file run by llama.cpp"),
        ('endpoint = { url = "http://h/v1" }', "teacher.endpoint.model: is missing"),
        ('endpoint = { url = "http://h/v1", model = "" }', "teacher.endpoint.model"),
        ('endpoint = { url = "ftp://h/v1", model = "m" }', "teacher.endpoint.url"),
        ('endpoint = { url = "http://", model = "m" }', "teacher.endpoint.url"),
        ('endpoint = { url = "http://me:secret@h/v1", model = "m" }', "teacher.endpoint: url has a user"),
        ('endpoint = { url = "http://h/v1?key=secret", model = "m" }', "teacher.endpoint: url has a user"),
        ('endpoint = { url = "http://h/v1", model = "m", key = "sk" }', "teacher.endpoint: unknown key 'key'"),
        ('endpoint = { url = "http://h/v1", model = "m", timeout_s = 0 }', "teacher.endpoint.timeout_s"),
        ('endpoint = { url = "http://h/v1", model = "m", concurrency = 0 }', "teacher.endpoint.concurrency"),
        (
            'endpoint = { url = "http://h/v1", model = "m", max_cost = 5.0 }',
            "max_cost needs input_price and output_price",
        ),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(folder: Path, line: str, says: str) -> None:
    (folder / "teacher.gguf").write_bytes(b"")
    text = MINIMAL.replace('model = "teacher"\n', "") if "\nmodel" in line else MINIMAL
    message = refused(recipe_with(folder, text.replace("[teacher]\n", f"[teacher]\n{line}\n"))).message
    assert says in message
    assert "secret" not in message


ENDPOINT = MINIMAL.replace('model = "teacher"', 'endpoint = { url = "http://localhost:8000/v1", model = "m" }')


def test_an_endpoint_alone_serves_training_on_answers_with_a_student_of_its_own(folder: Path) -> None:
    student = '[student]\nmodel = "teacher"\n'
    recipe = read_recipe(recipe_with(folder, ENDPOINT + student + '[distill]\nmethod = "answers"\n'))
    assert recipe.teacher.model is None
    assert recipe.teacher.endpoint is not None
    assert "no weights to make a student from" in refused(recipe_with(folder, ENDPOINT)).message
    assert "no logits: set distill.method" in refused(recipe_with(folder, ENDPOINT + student)).message
    with_steps = ENDPOINT + student + '[distill]\nmethod = "answers"\n[on_policy]\nsteps = 5\n'
    assert "on_policy.steps = 0" in refused(recipe_with(folder, with_steps)).message


def test_an_endpoint_takes_no_repetition_penalty(folder: Path) -> None:
    text = MINIMAL + '[teacher.endpoint]\nurl = "http://h/v1"\nmodel = "m"\n[generate]\nrepetition_penalty = 1.1\n'
    assert "not part of the endpoint's interface" in refused(recipe_with(folder, text)).message
    assert read_recipe(recipe_with(folder, text + 'answers = "dataset"\n')).generate.repetition_penalty == 1.1


@pytest.mark.parametrize("line", ['method = "uld"', "\n[on_policy]\nsteps = 5"])
def test_a_teacher_in_llama_cpp_cannot_be_trained_beside(folder: Path, line: str) -> None:
    (folder / "teacher.gguf").write_bytes(b"")
    text = MINIMAL.replace('"teacher"', '"teacher.gguf"\nengine = "llama.cpp"') + '[student]\nmodel = "teacher"\n'
    assert read_recipe(recipe_with(folder, text)).teacher.engine == "llama.cpp"
    assert "need the teacher in Transformers" in refused(recipe_with(folder, f"{text}[distill]\n{line}\n")).message


def test_how_an_endpoint_is_asked_is_not_part_of_what_is_asked(folder: Path) -> None:
    base = MINIMAL + '[teacher.endpoint]\nurl = "http://h/v1"\nmodel = "m"\n'
    plain = read_recipe(recipe_with(folder, base))
    other = "concurrency = 3\ntimeout_s = 5.0\nretries = 0\ninput_price = 1.0\noutput_price = 2.0\nmax_cost = 1.0\n"
    assert without_operational(read_recipe(recipe_with(folder, base + other))) == without_operational(plain)
    changed = read_recipe(recipe_with(folder, base.replace('"m"', '"n"')))
    assert without_operational(changed) != without_operational(plain)


def test_a_missing_key_and_a_missing_file_are_named(folder: Path) -> None:
    message = refused(recipe_with(folder, MINIMAL.replace('model = "teacher"', ""))).message
    assert "teacher: model is missing, and there is no endpoint either" in message
    assert (
        "data.train: is missing" in refused(recipe_with(folder, MINIMAL.replace('train = "train.jsonl"', ""))).message
    )
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
        for key, inner in getattr(model, "model_fields", {}).items():
            nested = next(_models_in(inner.annotation), None)
            assert (f"[{name}.{key}]" if nested else f"{key} = ") in text, f"{name}.{key}"
            for part in nested.model_fields if nested else ():
                assert f"# {part} = " in text, f"{name}.{key}.{part}"


def test_the_commented_defaults_of_init_are_the_defaults(folder: Path) -> None:
    """Uncommenting every `# key = value` line that has a default changes nothing."""
    live, table, found = [], "", 0
    for line in recipe_template().replace('"models/teacher"', '"teacher"').replace('"data/', '"').splitlines():
        text = line.removeprefix("# ")
        if _is_toml(text) and text.startswith("["):
            table = text.strip("[]") + "."
        path = table + text.partition(" = ")[0]
        default = line.startswith("# ") and _is_toml(text) and path not in _OPTIONAL and path.count(".") < 2
        found += default and " = " in text
        live.append(text if default and not text.startswith("[") else line)
    assert found > 60
    assert read_recipe(recipe_with(folder, "\n".join(live))) == read_recipe(
        recipe_with(folder, MINIMAL.replace('"tiny"', '"my-model"'))
    )


def test_the_endpoint_that_init_shows_is_one(folder: Path) -> None:
    text = recipe_template().replace('"models/teacher"', '"teacher"').replace('"data/', '"')
    before, header, after = text.partition("# [teacher.endpoint]\n")
    shown, blank, rest = after.partition("\n\n")
    keys = [line.removeprefix("# ") for line in shown.splitlines() if _is_toml(line.removeprefix("# "))]
    live = before + header.removeprefix("# ") + "\n".join(keys) + blank + rest
    endpoint = read_recipe(recipe_with(folder, live)).teacher.endpoint
    assert endpoint is not None
    assert keys
    assert {key.partition(" = ")[0] for key in keys} == set(type(endpoint).model_fields)
    assert endpoint.url == "http://localhost:8000/v1"


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
    assert {"x86-cpu", "rpi5"} <= set(targets())


def test_an_unknown_target_names_those_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        read_target("vax")
    assert "x86-cpu" in str(caught.value.hint)
    with pytest.raises(RecipeError) as caught:
        read_target("rpi-5")
    assert "did you mean 'rpi5'?" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("memory_mib = 10", "memory_mib"),
        ("[runtime]\npage_bytes = 5000", "page_bytes"),
        ("[runtime.isa.forbidden]\nAVX = '('", "no regular expression"),
        ("colour = 1", "unknown key 'colour'"),
        ('[runtime]\nbackend = "cpu"', "runtime.backend: input should be 'CPU' or 'CUDA'"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(tmp_path: Path, line: str, says: str) -> None:
    text = targets()["x86-cpu"].read_text().partition("[runtime.isa]")[0]
    if line.startswith("[runtime]"):
        key = line.split()[1]
        text = re.sub(rf"^{key} = .*\n", "", text, flags=re.MULTILINE).replace("[runtime]\n", f"{line}\n")
    elif line.startswith("["):
        text += line
    else:
        text = f"{line}\n{text}"
    (tmp_path / "x86-cpu.toml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        read_target(str(tmp_path / "x86-cpu.toml"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (None, "`toolchain schema --of target` lists every key"),
        ("", "add `backend = …`; `toolchain schema --of target`"),
        ('bakend = "CPU"', "did you mean 'backend'?"),
    ],
)
def test_what_a_profile_lacks_is_told_with_what_shows_its_keys(tmp_path: Path, text: str | None, hint: str) -> None:
    path = tmp_path / "x86-cpu.toml"
    if text is not None:
        path.write_text(targets()["x86-cpu"].read_text().replace('backend = "CPU"', text))
    with pytest.raises(RecipeError) as caught:
        read_target(str(path))
    assert str(caught.value.hint).startswith(hint)


def test_a_recipe_that_lacks_something_is_told_what_shows_its_keys(folder: Path) -> None:
    for path in (folder / "none.toml", recipe_with(folder, MINIMAL.replace('name = "tiny"', ""))):
        assert "`toolchain init` writes a recipe with every key" in str(refused(path).hint)


def test_a_device_without_a_cross_compiler_is_not_built_for_on_another_processor() -> None:
    with pytest.raises(HostError, match="jetson-orin is built on aarch64, this host is x86_64"):
        read_target("jetson-orin").check_build_host("x86_64")
    read_target("jetson-orin").check_build_host("aarch64")
    read_target("rpi5").check_build_host("x86_64")
