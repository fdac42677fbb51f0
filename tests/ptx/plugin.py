"""A plugin of pytest, to be named in PYTEST_PLUGINS: Triton's kernels take tensors on the CPU, by the code for a GPU.

FASTGEN_TEST_PTX=90 carries out what is compiled for sm_90, all threads in lockstep; "90 late" as late as may be (see
machine.py). A run in which nothing was carried out fails.
"""

import importlib
import os

import pytest


def start(architecture: str, *late: str) -> None:
    importlib.import_module("triton")  # at import it decides whether its own functions are interpreted: they are not
    os.environ["TRITON_INTERPRET"] = "1"  # which fastgen takes as leave to launch kernels on the CPU
    importlib.import_module("fastgen.backend")
    del os.environ["TRITON_INTERPRET"]
    importlib.import_module("ptx.launches").emulate(int(architecture), bool(late))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not importlib.import_module("ptx.launches").codes and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


start(*os.environ["FASTGEN_TEST_PTX"].split())
