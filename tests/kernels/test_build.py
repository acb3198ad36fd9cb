"""What the compiler made of csrc/: integer kernels without float arithmetic, nothing shared by instruction sets."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Arithmetic on floats, conversions included; moves, shuffles and bitwise operations of the same registers are none.
OPERATIONS = "add|sub|mul|div|sqrt|rcp|rsqrt|min|max|round|rndscale|reduce|range|scalef|getexp|getmant|fixupimm|fpclass"
OPERATIONS += "|cmp|comi|ucomi|hadd|hsub|addsub|dp|exp2|fn?m(?:add|sub)|fm(?:addsub|subadd)|fc?m(?:add|ul)c"
FLOAT = re.compile(rf"(?:v?(?:{OPERATIONS})\w*?(?:ss|sd|sh|ps|pd|ph)[xyzlq]?|v?cvt\w+|vdpbf16ps|f\w+)")
PREFIXES = r"(?:(?:\{\w+\}|lock|rep[nez]*|bnd|notrack|data16|addr32|[c-gs]s|xacquire|xrelease)\s+)*"
MATHS = (
    "sqrt|fma|floor|ceil|round|trunc|exp|exp2|expm1|log|log2|pow|tanh|erf|sin|cos|l{0,2}rint|l{1,2}round|frexp|ldexp"
)
FLOAT_CALL = re.compile(
    rf"(?:{MATHS})[fl]?|__(?:add|sub|mul|div|neg|cmp|eq|ne|lt|le|gt|ge|unord|fix|float|extend|trunc)\w*[sdtx]f\w*"
)


def needs(*tools: str) -> None:
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def output(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session", params=["Release"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object files by the name of their source."""
    needs("cmake", "c++")
    build = tmp_path_factory.mktemp("build")
    said = output("cmake", "-S", ROOT, "-B", build, f"-DCMAKE_BUILD_TYPE={request.param}")
    said += output("cmake", "--build", build, "--parallel", "2")
    assert "warning:" not in said
    found = {path.name.removesuffix(".cc.o"): path for path in build.rglob("*.cc.o")}
    assert {"integer_portable", "float_portable", "interface", "team"} <= set(found)
    return found


def instructions(path: Path) -> list[str]:
    listing = output("objdump", "-d", "--no-show-raw-insn", path)
    return re.findall(rf"^\s+[0-9a-f]+:\s+{PREFIXES}(\S+)", listing, re.M)


def symbols(path: Path) -> list[tuple[str, str]]:
    """Kind and name; a weak or vague one that is defined is one of `W`, `V` and `u`."""
    return re.findall(r"^[0-9a-f ]+ (\w) (.+)$", output("nm", path), re.M)


def shared(path: Path) -> list[str]:
    """Code, and data but for pointers to the runtime's functions, of which the linker keeps one copy of several."""
    return [name for kind, name in symbols(path) if kind in "WuV" and not name.startswith("DW.ref.")]


@pytest.mark.slow
def test_integer_kernels_hold_no_float_arithmetic(objects: dict[str, Path]) -> None:
    needs("objdump", "nm")
    kinds = sorted(name.partition("_")[2] for name in objects if name.startswith("integer_"))
    assert kinds in (["portable"], ["avx2", "avx512vnni", "portable"])
    for kind in kinds:
        whole, real = objects[f"integer_{kind}"], objects[f"float_{kind}"]
        found = instructions(whole)
        assert len(found) > 1000, kind
        assert not {name for name in found if FLOAT.fullmatch(name)}, kind
        assert not [name for _, name in symbols(whole) if FLOAT_CALL.fullmatch(name)], kind
        assert sum(bool(FLOAT.fullmatch(name)) for name in instructions(real)) > 100, kind  # so it can be told
    assert [name for _, name in symbols(objects["float_portable"]) if FLOAT_CALL.fullmatch(name)]


@pytest.mark.slow
def test_vectors_are_used_where_they_may_be(objects: dict[str, Path]) -> None:
    """What runs where cpuid was not asked keeps to the instructions that every CPU of the platform has."""
    needs("objdump")
    if "integer_avx2" not in objects:
        pytest.skip("not x86-64")
    for name, path in objects.items():
        listing, found = output("objdump", "-d", "--no-show-raw-insn", path), set(instructions(path))
        assert ("%zmm" in listing) == ("avx512" in name), name
        assert ("%ymm" in listing) <= ("avx" in name), name
        assert any(each.startswith("v") for each in found) == ("avx" in name), name
        assert ("vpdpbusd" in found) == (name == "integer_avx512vnni" or name == "float_avx512vnni"), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "objects",
    ["Release", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("Debug", "MinSizeRel"))],
    indirect=True,
)
def test_instruction_sets_share_no_code(objects: dict[str, Path]) -> None:
    """Of a function that several objects define the linker keeps one, which another CPU may not be able to run."""
    needs("nm")
    for name, path in objects.items():
        if "_" in name:
            assert not shared(path), name
            tables = [symbol for kind, symbol in symbols(path) if kind in "TDRB"]
            assert len(tables) == 1, name  # nothing but the table is to be seen outside
    assert shared(objects["team"])  # others do have such code


def test_code_that_is_shared_would_be_seen(tmp_path: Path) -> None:
    needs("c++", "nm")
    code = (
        "int first(int);\n{} template <class T> __attribute__((noinline)) T twice(T x) {{ return first(x) * 2; }} {}\n"
    )
    code += "int call(int x) {{ return twice(x); }}\n"
    for name, around in (("own", ("namespace {", "}")), ("common", ("", ""))):
        source = tmp_path / f"{name}.cc"
        source.write_text(code.format(*around))
        output("c++", "-std=c++17", "-O2", "-fvisibility=hidden", "-c", source, "-o", source.with_suffix(".o"))
        assert bool(shared(source.with_suffix(".o"))) == (name == "common")


@pytest.mark.parametrize("kind", ["int", "float", "long double"])
def test_float_arithmetic_would_be_seen(tmp_path: Path, kind: str) -> None:
    needs("c++", "objdump")
    source = tmp_path / "sum.cc"
    source.write_text(f"{kind} sum({kind} a, {kind} b) {{ return a + b; }}\n")
    output("c++", "-O2", "-c", source, "-o", source.with_suffix(".o"))
    found = instructions(source.with_suffix(".o"))
    if "ret" not in " ".join(found):
        pytest.skip("not x86-64")
    assert any(FLOAT.fullmatch(name) for name in found) == (kind != "int")


YES = """
    vaddps mulsd vfmadd231ps vfnmsub132sd vfmaddsub213pd vcvtdq2ps cvttss2si cvtsi2sdl cvtsi2ssq vrndscaleps roundss
    sqrtss vrsqrt14ps rcpps vminps maxsd ucomiss vcomisd vcmpltps cmpless vcmpeq_oqpd vdivpd vsubss haddps vhsubpd vdpps
    vreduceps vscalefss vgetexppd vfpclasspsz vfixupimmps vaddph vdpbf16ps fldt fadds fmulp fxch fucomi fabs fchs
"""
NO = """
    vpmuldq vmovups vpdpbusd movss vpmaxsd vbroadcastss vpaddd vpminsd pmulld paddsw vpsubsb vpsubd addl addq subl imulq
    mulq divq idivq vandps vxorps vblendvps vshufps unpcklps vextractf128 vinsertf64x4 vpermps vpcmpgtd vpcmpeqb cmpl
    cmpxchg cmovll vpackssdw vpmaddubsw vpabsb vzeroupper movhlps vmovaps xadd maskmovdqu prefetchw sfence endbr64
"""


@pytest.mark.parametrize("name", YES.split())
def test_what_counts_as_float_arithmetic(name: str) -> None:
    assert FLOAT.fullmatch(name)


@pytest.mark.parametrize("name", NO.split())
def test_what_does_not(name: str) -> None:
    assert not FLOAT.fullmatch(name)
