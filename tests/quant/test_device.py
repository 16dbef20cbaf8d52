"""Which device is used: the best there is, or what the user says, and an error for one that is not there."""

import pytest
import torch

from adapterx.errors import OptionError
from adapterx.quant.device import Accelerator, auto_detect_accelerator, target_device

VARIABLES = ("ADAPTERX_TARGET_DEVICE", "INC_TARGET_DEVICE")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def available(monkeypatch, *kinds):
    monkeypatch.setattr(Accelerator, "is_available", lambda self: self.kind in (*kinds, "cpu"))


@pytest.mark.parametrize(
    ("kinds", "best"),
    [(("cuda", "xpu", "hpu"), "hpu"), (("cuda", "xpu"), "xpu"), (("cuda",), "cuda"), ((), "cpu")],
)
def test_the_best_that_is_available_is_found(monkeypatch, kinds, best):
    available(monkeypatch, *kinds)
    assert auto_detect_accelerator().name() == best


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", ["cpu", "CPU"])
def test_a_variable_wins_over_what_is_best_and_what_is_asked_for(monkeypatch, variable, value):
    available(monkeypatch, "cuda")
    monkeypatch.setenv(variable, value)
    assert auto_detect_accelerator().name() == "cpu"
    assert auto_detect_accelerator("cuda").name() == "cpu"
    assert target_device("cuda") == torch.device("cpu")


def test_our_variable_wins_over_the_other(monkeypatch):
    available(monkeypatch, "cuda", "xpu")
    monkeypatch.setenv("INC_TARGET_DEVICE", "xpu")
    assert auto_detect_accelerator().name() == "xpu"
    monkeypatch.setenv("ADAPTERX_TARGET_DEVICE", "cuda")
    assert auto_detect_accelerator().name() == "cuda"
    monkeypatch.setenv("ADAPTERX_TARGET_DEVICE", "auto")
    assert auto_detect_accelerator().name() == "xpu"


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_device_that_is_not_available_is_an_error(monkeypatch, variable):
    available(monkeypatch)
    monkeypatch.setenv(variable, "hpu")
    with pytest.raises(OptionError, match=f"{variable}='hpu' is not available .* available: cpu"):
        auto_detect_accelerator()


def test_a_device_that_does_not_exist_is_an_error_with_the_nearest(monkeypatch):
    monkeypatch.setenv("ADAPTERX_TARGET_DEVICE", "cda")
    with pytest.raises(OptionError, match="is no device; known are hpu, xpu, cuda, cpu; nearest is cuda"):
        auto_detect_accelerator()
    monkeypatch.delenv("ADAPTERX_TARGET_DEVICE")
    with pytest.raises(OptionError, match="device_name='tpu'"):
        auto_detect_accelerator("tpu")


def test_the_cpu_has_the_calls_that_others_have():
    cpu = auto_detect_accelerator("cpu")
    assert (cpu.name(), cpu.device_name(0), cpu.current_device(), cpu.current_device_name()) == ("cpu",) * 4
    assert cpu.device() == torch.device("cpu")
    cpu.set_device(0)
    cpu.synchronize()
    cpu.empty_cache()


def test_devices_have_numbers(monkeypatch):
    available(monkeypatch, "cuda")
    assert target_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert auto_detect_accelerator("cuda").current_device_name() == "cuda:3"
