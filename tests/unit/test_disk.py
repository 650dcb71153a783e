"""Room on a disk, and what doctor estimates that a recipe needs of it."""

import shutil
from pathlib import Path

import pytest

from toolchain import doctor
from toolchain.disk import free_bytes, require_free
from toolchain.errors import HostError
from toolchain.recipe import Data, Distill, Endpoint, Recipe, Student, Teacher


def test_a_folder_that_is_not_there_yet_has_the_room_of_the_disk_it_will_be_on(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    assert 0 <= free_bytes(tmp_path / "not" / "yet") <= total


def test_too_little_room_is_an_error_with_both_figures_and_a_hint(tmp_path: Path) -> None:
    require_free(tmp_path, 0, "nothing")
    with pytest.raises(HostError, match=r"MiB free, the model needs 1073741824 MiB") as caught:
        require_free(tmp_path / "later", 1 << 50, "the model", hint="use another disk")
    assert caught.value.hint == "use another disk"


def test_doctor_counts_the_student_alone_where_the_teacher_is_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))

    def recipe(teacher: Teacher) -> Recipe:
        return Recipe(
            name="tiny",
            teacher=teacher,
            student=Student(model=tmp_path),
            data=Data(train=tmp_path, held_out=tmp_path),
            distill=Distill(method="answers"),
        )

    remote = Teacher(endpoint=Endpoint(url="http://localhost:8000/v1", model="teacher"))
    assert doctor.needs(recipe(Teacher(model=tmp_path)))[0] - doctor.needs(recipe(remote))[0] == 1000
