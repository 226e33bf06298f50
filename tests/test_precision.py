"""Reduced precision is chosen by what the hardware can do, and never at the cost of what was asked for."""

import platform

import pytest
import torch

from invrecon import precision
from invrecon.errors import InputError
from invrecon.precision import check_precision, has_bfloat16, reduced_dtype, resolve_precision, training_precision


@pytest.fixture(autouse=True)
def forget():
    has_bfloat16.cache_clear()
    yield
    has_bfloat16.cache_clear()


def hardware(monkeypatch, avx512: bool = False, amx: bool = False, machine: str = "x86_64") -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_auto_is_bfloat16_only_where_the_processor_has_it(monkeypatch, avx512, amx):
    hardware(monkeypatch, avx512, amx)
    native = avx512 or amx
    assert resolve_precision("auto", "cpu") == ("bf16" if native else "32")
    assert reduced_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if native else None)
    assert training_precision("cpu") == ("bf16-mixed" if native else "32-true")


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
@pytest.mark.parametrize("native", [True, False])
def test_arm_is_asked_what_its_library_can(monkeypatch, machine, native):
    hardware(monkeypatch, avx512=True, machine=machine)  # which says nothing of this processor
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert has_bfloat16("cpu") is native
    has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert has_bfloat16("cpu") is False


def test_windows_spells_its_processor_otherwise(monkeypatch):
    hardware(monkeypatch, amx=True, machine="AMD64")
    assert has_bfloat16("cpu") is True


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_it_computes_in_float32(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert resolve_precision("auto", "cuda:1") == ("bf16" if native else "32")


def test_other_devices_compute_in_float32():
    assert resolve_precision("auto", "mps") == "32" and training_precision("other") == "32-true"


@pytest.mark.parametrize(("name", "dtype"), [("32", None), ("bf16", torch.bfloat16), ("16", torch.float16)])
def test_what_is_asked_for_is_done(monkeypatch, name, dtype):
    hardware(monkeypatch)
    assert check_precision(name) == resolve_precision(name, "cpu") == name
    assert reduced_dtype(name, "cpu") == dtype


def test_an_unknown_precision_is_named():
    with pytest.raises(InputError, match=r"model.precision is '8', expected one of auto, 32, bf16, 16"):
        check_precision("8")
    assert set(precision.PRECISIONS) == {"auto", "32", "bf16", "16"}
