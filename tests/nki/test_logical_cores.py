"""The runtime's setting of logical cores: kernels follow it, or are refused before a launch."""

from typing import Any

import jax
import pytest

import jax_tkg
from jax_tkg.lnc.implementation import XlaLnc
from jax_tkg.nki import toolchain
from jax_tkg.nki.append_call import NkiWriter
from jax_tkg.nki.arguments import Launch
from jax_tkg.nki.cte.implementation import NkiPrefill
from jax_tkg.nki.custom_call import NkiJit, Outline
from jax_tkg.nki.implementation import Interpreter, Nki, NkiInterpret

SETTING = "NEURON_LOGICAL_NC_CONFIG"
WITH_PROGRAMS = (Nki, NkiInterpret, NkiPrefill, NkiWriter, XlaLnc)


@pytest.mark.parametrize(("setting", "programs"), [(None, 2), ("1", 1), ("2", 2), ("3", 2)])
def test_the_default_follows_the_setting(
    setting: str | None, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    if setting is not None:
        monkeypatch.setenv(SETTING, setting)
    assert {kind().programs for kind in WITH_PROGRAMS} == {programs}
    assert {kind(programs=1).programs for kind in WITH_PROGRAMS} == {1}


@pytest.mark.parametrize(
    ("setting", "programs", "refused"),
    [
        (None, 1, False), (None, 2, False), ("1", 1, False), ("2", 2, False),
        ("1", 2, True), ("2", 1, True), ("4", 2, True), ("", 2, True),
    ],
)  # fmt: skip
def test_another_number_is_refused_with_both(
    setting: str | None, programs: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    if setting is not None:
        monkeypatch.setenv(SETTING, setting)
    reason = toolchain.wrong_programs(programs)
    assert (reason is not None) is refused
    launch: Any = Launch(print, (), (), None)
    if reason is None:
        assert "no NKI compiler" in (NkiJit().why_not(programs) or "")
        return
    assert NkiJit().why_not(programs) == reason
    with pytest.raises(RuntimeError, match=SETTING):
        NkiJit().call(launch, programs)
    assert Interpreter().why_not(programs) is Outline().why_not(programs) is None
    if setting in ("1", "2"):
        assert reason.startswith(f"{SETTING}={setting}, and this launches {programs} program(s)")
        assert f"Nki(programs={setting})" in reason
        assert reason.endswith(f"start the process with {SETTING}={programs}")
    else:
        assert reason.startswith(f"{SETTING}={setting!r}: it must be 1 or 2")


def test_a_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "1")
    query = jax.ShapeDtypeStruct((1, 1, 2, 64), "float32")
    cache = jax.eval_shape(lambda: jax_tkg.KVCache.create(1, 256, 1, 64))
    explained = jax_tkg.explain(
        query, cache, platform="neuron", implementation=[Nki(programs=2), "xla"]
    )
    assert explained.implementation == "xla"
    (_, reason), = explained.rejected  # fmt: skip
    assert "NEURON_LOGICAL_NC_CONFIG=1, and this launches 2 program(s)" in reason
