"""The package as it is imported: what it loads, names and refuses."""

import importlib.metadata
import inspect
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import lolcats_ops as lo


def python(code):
    return run_python("-c", code)


def run_python(*arguments):
    """What a fresh interpreter prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_numpy_alone():
    code = "import sys, lolcats_ops; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert python(code) == "False False"


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("hybrid_attention", "torch", "torch"),
        ("reference", "torch", "torch"),
        ("hf", "transformers", "hf"),
        ("convert", "transformers", "hf"),
    ],
)
def test_without_a_dependency_the_error_says_what_to_install(name, missing, extra):
    code = f"""
import importlib.util, lolcats_ops
find_spec = lolcats_ops.find_spec
lolcats_ops.find_spec = lambda package: None if package == {missing!r} else find_spec(package)
try:
    lolcats_ops.{name}
except ImportError as error:
    print(error)
"""
    expected = f"lolcats_ops.{name} needs {missing}: pip install 'lolcats_ops[{extra}]'"
    assert python(code) == expected


def test_numpy_operators_run_where_torch_cannot_be_imported():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, lolcats_ops as lo
features = lo.numpy.Features(np.ones((2, 4, 4)))
print(lo.numpy.feature_map(np.ones((1, 2, 3, 4), np.float32), features).sum(-1).max())
"""
    assert python(code) == "2.0"


def test_the_source_folder_says_that_it_is_not_the_package(monkeypatch):
    monkeypatch.setattr(lo, "find_spec", lambda name: None if name.endswith("._C") else name)
    with pytest.raises(ImportError, match="is the source, without the compiled library"):
        lo._load("numpy")


def test_cupy_is_an_attribute_that_says_what_it_needs():
    if find_spec("cupy") is None:
        with pytest.raises(ImportError, match=r"lolcats_ops\.cupy needs CuPy"):
            _ = lo.cupy
    else:
        assert lo.cupy.feature_map


def test_every_public_name_exists():
    for name in lo.__all__:
        assert getattr(lo, name) is not None
    assert set(lo.__all__) <= set(dir(lo))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lo.nonsense


def test_backends_is_a_function_whatever_was_imported_before():
    assert "reference" in python(
        "import lolcats_ops.ops, lolcats_ops; print(lolcats_ops.backends())"
    )


def test_version_is_the_installed_one():
    assert lo.__version__ == importlib.metadata.version("lolcats_ops")


def test_paths_lead_to_the_header_the_libraries_and_the_cmake_files():
    assert (Path(lo.get_include()) / "lolcats_ops" / "lolcats_ops.h").is_file()
    assert (Path(lo.get_cmake_dir()) / "lolcats_opsConfig.cmake").is_file()
    assert Path(lo.get_library()).is_file()
    assert Path(lo.get_torch_library()).is_file()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--cmakedir", lo.get_cmake_dir()),
        ("--include", lo.get_include()),
        ("--library", lo.get_library()),
        ("--torch-library", lo.get_torch_library()),
        ("--version", lo.__version__),
    ],
)
def test_module_prints_paths_for_build_scripts(option, value):
    assert run_python("-m", "lolcats_ops", option) == value


def test_the_library_stays_while_its_threads_may_run():
    """They outlive a call, and would run in what dlclose() had taken away."""
    script = (
        "import _ctypes, ctypes, sys; library = ctypes.CDLL(sys.argv[1]); "
        "_ctypes.dlclose(library._handle); assert sys.argv[1] in open('/proc/self/maps').read()"
    )
    library = Path(lo.get_library()).resolve()
    subprocess.run([sys.executable, "-c", script, str(library)], check=True)


@pytest.mark.parametrize(
    ("op", "settings"),
    [
        (lo.hybrid_attention, "Settings"),
        (lo.linear_attention, "Settings"),
        (lo.numpy.linear_attention, "LinearSettings"),
    ],
)
def test_type_checkers_know_every_keyword(op, settings):
    """Overloads, by return_state, take the others from a TypedDict."""
    known = getattr(sys.modules[op.__module__], settings).__annotations__
    parameters = inspect.signature(op).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords.pop("return_state") == "bool"
    assert {name: x.__forward_arg__ for name, x in known.items()} == keywords
