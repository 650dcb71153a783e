"""Reading what a program asks of the machine it runs on."""

import errno
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles

pytest.importorskip("elftools")

from toolchain.bundle import runtime
from toolchain.errors import ExternalToolError, HostError, RecipeError
from toolchain.target import TargetProfile, read_target, targets

gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


def compile_program(tmp_path: Path, *options: str) -> Path:
    source = tmp_path / "a.c"
    source.write_text('#include <math.h>\n#include <stdio.h>\nint main(int n, char **v) { printf("%f", exp(n)); }\n')
    program = tmp_path / "a"
    subprocess.run(["gcc", str(source), "-o", str(program), "-lm", *options], check=True)
    return program


@gcc
def test_needed_libraries_versions_and_search_path_are_read(tmp_path: Path) -> None:
    elf = runtime.read_elf(compile_program(tmp_path, "-Wl,-rpath,$ORIGIN:/opt/lib", "-Wl,-z,max-page-size=65536"))
    assert elf.arch == platform.machine()
    assert set(elf.needed) == {"libm.so.6", "libc.so.6"}
    assert elf.search == ("$ORIGIN", "/opt/lib")
    assert elf.alignment == 65536
    assert elf.glibc >= (2, 2)
    assert elf.glibc_symbol in ("exp", "__libc_start_main")


@gcc
@pytest.mark.parametrize(
    "entry", ["/opt/lib", "$ORIGIN:", "$ORIGIN/../../..", "$ORIGIN:$ORIGIN/../../../lib", "$ORIGINAL"]
)
def test_a_search_path_outside_the_bundle_is_refused(tmp_path: Path, entry: str) -> None:
    elf = runtime.read_elf(compile_program(tmp_path, f"-Wl,-rpath,{entry}"))
    target = read_target("x86-cpu").model_copy(update={"arch": platform.machine()})
    target = target.model_copy(update={"runtime": target.runtime.model_copy(update={"glibc_floor": "9.9"})})
    with pytest.raises(HostError, match="a looks for libraries in"):
        runtime._check("a", elf, target, set())


@pytest.mark.parametrize("entry", ["$ORIGIN", "${ORIGIN}/", "$ORIGIN/../lib", "$ORIGIN/../.."])
def test_a_search_path_inside_the_bundle_is_none_to_refuse(entry: str) -> None:
    assert runtime._stays_inside(entry)


@gcc
def test_programs_for_a_newer_glibc_are_refused_with_what_builds_for_an_older_one(tmp_path: Path) -> None:
    elf = runtime.read_elf(compile_program(tmp_path))
    target = host(tmp_path)
    target = target.model_copy(update={"runtime": target.runtime.model_copy(update={"glibc_floor": "2.1"})})
    with pytest.raises(HostError, match=r"a needs glibc .*, the target fourth has 2\.1") as caught:
        runtime._check("a", elf, target, set())
    assert 'CMAKE_SYSROOT = "{sysroot}"' in str(caught.value.hint)
    assert "container of a system with glibc 2.1" in str(caught.value.hint)


def test_a_text_is_not_a_program(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("#!/bin/sh\n")
    with pytest.raises(ExternalToolError, match="not a program or library"):
        runtime.read_elf(path)


def host(tmp_path: Path, **isa: dict[str, Any]) -> TargetProfile:
    """A made-up profile for this host's processor, from a file of its own."""
    rules = ""
    for kind, found in isa.items():
        lines = [
            f"{json.dumps(name)} = " + (f"'{rule}'" if isinstance(rule, str) else f"{rule}")
            for name, rule in found.items()
        ]
        rules += "\n".join([f"[runtime.isa.{kind}]", *lines, ""])
    (tmp_path / "fourth.toml").write_text(
        f'name = "fourth"\ndescription = "made up"\narch = "{platform.machine()}"\n'
        f'[runtime]\nbackend = "CPU"\nglibc_floor = "9.9"\npage_bytes = 16384\n[runtime.cmake]\n{rules}'
    )
    return read_target(str(tmp_path / "fourth.toml"))


@gcc
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX is x86's")
def test_an_instruction_that_the_target_lacks_is_found_and_shown(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    source = tmp_path / "b.c"
    source.write_text("void add(float *a) { for (int i = 0; i < 64; i++) a[i] += 1; }\nint main(void) { return 0; }\n")
    target = host(tmp_path, forbidden={"AVX": "%[yz]mm[0-9]"})
    for options, name in (([], "plain"), (["-mavx"], "avx")):
        subprocess.run(["gcc", "-O3", *options, str(source), "-o", str(tmp_path / "bin" / name)], check=True)
        if name == "plain":
            runtime.check_isa(tmp_path / "bin", target)
    with pytest.raises(HostError, match=r"avx uses AVX, which the target fourth does not have: .*%ymm"):
        runtime.check_isa(tmp_path / "bin", target)


BEYOND_SSE42 = {
    "AVX": ("vmovaps %xmm0,%xmm1", "vfmadd132ss %xmm0,%xmm1,%xmm2", "vcvtsi2ss %eax,%xmm0,%xmm0", "vzeroupper"),
    "AVX-512 masks": ("kmovw %k1,%eax",),
    "AMX": ("tilezero %tmm0", "tilerelease"),
    "BMI1": ("andn %rax,%rbx,%rcx", "blsr %rax,%rbx", "bextr %rax,(%rdi),%rcx"),
    "BMI2": ("shlx %rax,%rbx,%rcx", "mulx %rax,%rbx,%rcx", "rorx $3,%eax,%ebx"),
    "TBM": ("blcfill %eax,%ebx",),
    "LZCNT": ("lzcnt %rax,%rbx", "lzcntw (%rdi),%ax"),
    "MOVBE": ("movbe (%rdi),%eax",),
    "ADX": ("adcx %rax,%rbx", "adox %rax,%rbx"),
    "AES and carry-less products": ("aesenc %xmm0,%xmm1", "pclmullqlqdq %xmm0,%xmm1"),
    "SHA": ("sha256rnds2 %xmm0,%xmm1,%xmm2",),
    "GFNI": ("gf2p8mulb %xmm0,%xmm1",),
    "SSE4a": ("movntsd %xmm0,(%rdi)",),
}
NOT_BEYOND_SSE42 = "crc32q %rax,%rbx; popcnt %rax,%rbx; pcmpgtq %xmm0,%xmm1; bsr %rax,%rbx; rep bsf %rax,%rbx"
BEYOND_A76 = {
    "8-bit matrix products": ("smmla v0.4s,v1.16b,v2.16b",),
    "bfloat16": ("bfdot v0.4s,v1.8h,v2.8h",),
    "half-precision products to single": ("fmlal v0.4s,v1.4h,v2.4h", "fmlsl2 v0.4s,v1.4h,v2.4h"),
    "complex numbers": ("fcmla v0.4s,v1.4s,v2.4s,#90", "fcadd v0.4s,v1.4s,v2.4s,#90"),
    "JavaScript's conversion": ("fjcvtzs w0,d0",),
    "rounding to 32 and 64 bits": ("frint64z d0,d1",),
    "SHA-512, SHA-3, SM3, SM4": (
        "sha512h q0,q1,v2.2d",
        "eor3 v0.16b,v1.16b,v2.16b,v3.16b",
        "sm4ekey v0.4s,v1.4s,v2.4s",
    ),
    "signed pointers, but for hints": ("retaa", "braaz x0", "pacia x0,x1", "autdzb x0", "xpaci x0", "ldraa x0,[x1]"),
    "unaligned ldapr": ("ldapurb w0,[x1,#1]", "stlur x0,[x1,#1]"),
    "flags by instruction": ("cfinv", "rmif x0,#1,#2", "setf8 w0", "axflag"),
    "copies by instruction": ("cpyfp [x0]!,[x1]!,x2!", "setmn [x0]!,x1!,x2"),
    "SVE": ("add z0.s,z1.s,z2.s", "ptrue p0.b"),
    "SVE's counts": ("rdvl x0,#1", "cntd x1", "cntb x0", "addvl sp,sp,#-1", "incd x0", "sqdecw x0", "setffr"),
    "SME": ("rdsvl x0,#1", "smstart", "zero {za}", "ldr za[w12,0],[x0]"),
}
NOT_BEYOND_A76 = (
    "sdot v0.4s,v1.16b,v2.16b; fmla v0.8h,v1.8h,v2.8h; ldapr x0,[x1]; ldadd w0,w1,[x2]; sqrdmlah v0.4s,v1.4s,v2.4s; "
    "aese v0.16b,v1.16b; pmull v0.1q,v1.1d,v2.1d; paciasp; autia1716; xpaclri; bti c; smlal v0.4s,v1.4h,v2.4h; "
    "cnt v0.8b,v1.8b; cntd x0"
)
# What a Cortex-A78AE has of later ones: pointers that are signed, ldapur, some instructions for flags.
_HAS = ("signed pointers, but for hints", "unaligned ldapr", "flags by instruction")
BEYOND_A78AE = {name: lines for name, lines in BEYOND_A76.items() if name not in _HAS}
BEYOND_A78AE["flags of other forms"] = ("axflag",)
_A78AE_HAS = "; ".join(line for name in _HAS for line in BEYOND_A76[name] if line != "axflag")
JETSONS = ("jetson-orin", "jetson-orin-jp7")
BEYOND = {"x86-cpu": BEYOND_SSE42, "rpi5": BEYOND_A76, **dict.fromkeys(JETSONS, BEYOND_A78AE)}
ALLOWED = {
    "x86-cpu": NOT_BEYOND_SSE42,
    "rpi5": NOT_BEYOND_A76,
    **dict.fromkeys(JETSONS, f"{NOT_BEYOND_A76}; {_A78AE_HAS}"),
}
_EVERYTHING = ".arch armv9-a+sve2+sme+i8mm+bf16+sha3+sm4+crypto+fp16fml+flagm+mops\n"


def compiler_for(target: str) -> str:
    """A C compiler for a target's processor; skips where there is none."""
    arch = read_target(target).arch
    compiler = "gcc" if platform.machine() == arch else f"{arch}-linux-gnu-gcc"
    if shutil.which(compiler) is None or shutil.which(f"{arch}-linux-gnu-objdump") is None:
        pytest.skip(f"no {compiler}")
    return compiler


def assemble(lines: str, out: Path, target: str) -> None:
    source = ("" if target == "x86-cpu" else _EVERYTHING) + lines.replace(";", "\n") + "\n"
    argv = [compiler_for(target), "-c", "-x", "assembler", "-o", str(out), "-"]
    subprocess.run(argv, input=source, check=True, text=True)


@pytest.mark.parametrize(
    ("target", "rule", "line"),
    [(target, rule, line) for target, rules in BEYOND.items() for rule, lines in rules.items() for line in lines],
)
def test_what_the_oldest_processor_meant_lacks_is_refused(tmp_path: Path, target: str, rule: str, line: str) -> None:
    assemble(line, tmp_path / "a.o", target)
    with pytest.raises(HostError, match=rf"a\.o uses {rule}, which the target {target} does not have: 0: ") as caught:
        runtime.check_isa(tmp_path, read_target(target))
    assert line.split(maxsplit=1)[0].removesuffix("w") in caught.value.message


@pytest.mark.parametrize("target", BEYOND)
def test_what_the_oldest_processor_meant_has_is_allowed(tmp_path: Path, target: str) -> None:
    assemble(ALLOWED[target], tmp_path / "a.o", target)
    runtime.check_isa(tmp_path, read_target(target))


def test_every_rule_of_every_profile_is_tried() -> None:
    assert {name: set(read_target(name).runtime.isa.forbidden) for name in targets()} == {
        name: set(rules) for name, rules in BEYOND.items()
    }


PROGRAM = """
#include <complex.h>
#include <stdio.h>
#ifndef TIMES
#define TIMES I
#endif
float complex sums[64], more[64];
long shifted(long a, int b) { return a << b; }
__attribute__((noinline)) int called(int n) { return puts("x") + n; }
int main(int n, char **v) {
    for (int i = 0; i < 64; i++) sums[i] += more[i] * TIMES;
    return called(n) + shifted(n, n) + creal(sums[n]) * 1.5f;
}
"""


@pytest.mark.parametrize(
    ("target", "options", "found"),
    [
        ("x86-cpu", "-march=x86-64-v2", None),
        ("x86-cpu", "-march=haswell", "AVX"),
        ("x86-cpu", "-march=haswell -mno-avx", "BMI2"),
        ("rpi5", "-march=armv8.2-a+dotprod+fp16+rcpc -mbranch-protection=standard", None),
        ("rpi5", "-march=armv8.3-a", "complex numbers"),
        ("rpi5", "-march=armv8.3-a+nosimd -mbranch-protection=pac-ret", "signed pointers, but for hints"),
        ("rpi5", "-march=armv8.2-a+sve -DTIMES=2", "SVE"),
    ],
)
def test_a_program_for_a_newer_processor_is_refused(
    tmp_path: Path, target: str, options: str, found: str | None
) -> None:
    argv = [compiler_for(target), "-Ofast", *options.split(), "-c", "-x", "c", "-o", str(tmp_path / "a.o"), "-"]
    subprocess.run(argv, input=PROGRAM, check=True, text=True)
    if found is None:
        runtime.check_isa(tmp_path, read_target(target))
        return
    with pytest.raises(HostError, match=f"a.o uses {found}, which the target {target} does not have"):
        runtime.check_isa(tmp_path, read_target(target))


def test_code_that_asks_the_processor_first_is_allowed_in_its_own_file_alone(tmp_path: Path) -> None:
    for name, line in (("libmtmd.so.0", "lzcnt %rax,%rbx"), ("libllama.so.0", "bsr %rax,%rbx")):
        assemble(line, tmp_path / name, "x86-cpu")
    runtime.check_isa(tmp_path, read_target("x86-cpu"))
    assemble("lzcnt %rax,%rbx", tmp_path / "libllama.so.0", "x86-cpu")
    with pytest.raises(HostError, match=r"libllama\.so\.0 uses LZCNT"):
        runtime.check_isa(tmp_path, read_target("x86-cpu"))
    assemble("shlx %rax,%rbx,%rcx", tmp_path / "libmtmd.so.0", "x86-cpu")
    (tmp_path / "libllama.so.0").unlink()
    with pytest.raises(HostError, match=r"libmtmd\.so\.0 uses BMI2"):
        runtime.check_isa(tmp_path, read_target("x86-cpu"))


def test_an_exception_from_a_rule_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="asks_first names LZCMT, which is not among what is forbidden"):
        host(tmp_path, forbidden={"LZCNT": "lzcnt"}, asks_first={"libmtmd.so.0": ["LZCMT"]})


@gcc
def test_programs_without_the_kernels_that_the_target_wants_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "llama-server")
    with pytest.raises(HostError, match="llama-server makes no use of the dot product"):
        runtime.check_isa(tmp_path / "bin", host(tmp_path, required={"the dot product": "\\bvpdpbusd\\b"}))


@gcc
def test_what_was_looked_at_and_passed_is_not_looked_at_again_until_it_changes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "a")
    proven = tmp_path / "isa.json"
    target = host(tmp_path, forbidden={"nothing": "no such text"})
    runtime.check_isa(tmp_path / "bin", target, proven=proven)
    assert proven.is_file()
    other = host(tmp_path, forbidden={"returning": "\\bret"})
    with pytest.raises(HostError, match="a uses returning"):
        runtime.check_isa(tmp_path / "bin", other, proven=proven)


@gcc
def test_what_has_passed_needs_no_disassembler_and_what_has_not_says_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "a")
    proven = tmp_path / "isa.json"
    for rule in ("no such text", "nor this"):
        runtime.check_isa(tmp_path / "bin", host(tmp_path, forbidden={"nothing": rule}), proven=proven)
    monkeypatch.setenv("PATH", "/nowhere")
    for rule in ("no such text", "nor this"):
        runtime.check_isa(tmp_path / "bin", host(tmp_path, forbidden={"nothing": rule}), proven=proven)
    with pytest.raises(HostError, match=r"no disassembler for .* against the rules of fourth") as caught:
        runtime.check_isa(tmp_path / "bin", host(tmp_path, forbidden={"nothing": "other"}), proven=proven)
    assert "`toolchain runtime build --target fourth`" in str(caught.value.hint)


@gcc
def test_names_of_folders_and_functions_are_no_instructions(tmp_path: Path) -> None:
    folder = tmp_path / "p1" / "z2.0"
    folder.mkdir(parents=True)
    compile_program(tmp_path).rename(folder / "a")
    target = host(tmp_path, forbidden={"SVE": r"\b[zp][0-9]+[./]", "a function": "^[0-9a-f]+ <main>:"})
    for dispatched in ((), ("main",)):
        isa = target.runtime.isa.model_copy(update={"dispatched": dispatched})
        changed = target.model_copy(update={"runtime": target.runtime.model_copy(update={"isa": isa})})
        runtime.check_isa(folder, changed)


@gcc
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"{}"])
def test_a_damaged_record_of_what_passed_is_none(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "a")
    proven = tmp_path / "isa.json"
    proven.write_bytes(damage)
    runtime.check_isa(tmp_path / "bin", host(tmp_path, forbidden={"nothing": "no such text"}), proven=proven)
    assert json.loads(proven.read_text())[0]["files"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@gcc
def test_a_full_disk_leaves_the_record_of_what_passed_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "a")
    (tmp_path / "cache").mkdir()
    proven = tmp_path / "cache" / "isa.json"
    proven.write_text("{}")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HostError, match=r"isa\.json: no space left") as caught:
        runtime.check_isa(tmp_path / "bin", host(tmp_path, forbidden={"nothing": "no such text"}), proven=proven)
    assert caught.value.hint
    assert [(path.name, path.read_text()) for path in proven.parent.iterdir()] == [("isa.json", "{}")]


def test_a_full_disk_below_the_copies_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = bundles.install(tmp_path / "llama")
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(HostError, match=r"out: no space left for the programs, \d+ MiB") as caught:
        runtime.collect(llama, bundles.target(), tmp_path / "out")
    assert "TMPDIR" in str(caught.value.hint)


@pytest.mark.parametrize("name", sorted(name for name in targets() if read_target(name).arch == "aarch64"))
def test_programs_for_pages_of_4_kib_are_refused_on_every_arm_board(tmp_path: Path, name: str) -> None:
    target = read_target(name)
    source = "int main(void) { return 0; }\n"
    for size in (4096, 65536):
        argv = [compiler_for(name), "-x", "c", "-o", str(tmp_path / "a"), f"-Wl,-z,max-page-size={size}", "-"]
        subprocess.run(argv, input=source, text=True, check=True)
        elf = runtime.read_elf(tmp_path / "a")
        if size == 65536:
            runtime._check("a", elf, target, set())
            continue
        with pytest.raises(
            HostError, match=rf"a is aligned to 4096 bytes, the target {name} may have pages of \d{{5}}"
        ):
            runtime._check("a", elf, target, set())


@gcc
def test_programs_that_large_pages_cannot_map_are_refused(tmp_path: Path) -> None:
    elf = runtime.read_elf(compile_program(tmp_path, "-Wl,-z,max-page-size=4096"))
    with pytest.raises(HostError, match="a is aligned to 4096 bytes, the target fourth may have pages of 16384"):
        runtime._check("a", elf, host(tmp_path), set())
