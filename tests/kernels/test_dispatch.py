"""Which tensors the Triton kernels compute, and the errors for the others."""

from typing import Any

import pytest
import torch

from bn_lightning.kernels import batch_norm, dispatch
from bn_lightning.kernels.layout import as_layout, is_channels_last


def test_which_tensors_go_to_triton(device: str) -> None:
    x = torch.ones(4, 3, device=device)
    assert not dispatch.uses_triton(x, "native")
    assert dispatch.uses_triton(x, "auto") == (x.is_cuda and dispatch.TRITON_INSTALLED)
    assert not dispatch.uses_triton(x.double(), "auto")
    with pytest.raises(ValueError, match="fp32, fp16 or bf16|Triton to be installed"):
        dispatch.uses_triton(x.double(), "triton")
    if dispatch.TRITON_INSTALLED:
        assert dispatch.uses_triton(x, "triton")
        assert not dispatch.uses_triton(x[:0], "triton")


def test_triton_where_it_is_not_installed_raises(monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match='Triton to be installed .* backend="native"'):
        batch_norm(torch.ones(4, 3), training=True, backend="triton")
    batch_norm(torch.ones(4, 3), training=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_layout_is_copied_to_where_it_differs_and_kept_where_not(channels_last: bool) -> None:
    plain = torch.randn(2, 3, 4, 5)
    found = as_layout(plain, channels_last)
    assert torch.equal(found, plain) and is_channels_last(found) is channels_last
    assert (found.data_ptr() == plain.data_ptr()) is not channels_last
    assert as_layout(found, channels_last).data_ptr() == found.data_ptr()
