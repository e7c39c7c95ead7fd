from __future__ import annotations

import torch

from r2r_kernels import functional as F
from r2r_kernels.operators.layout import as_images, as_rows, memory_format


def test_results_have_the_format_of_a_view_too() -> None:
    """A slice of channels is in neither format without gaps; its results are in that of the whole."""
    for layout in (torch.contiguous_format, torch.channels_last):
        part = torch.randn(2, 8, 3, 5).contiguous(memory_format=layout)[:, :4]
        assert memory_format(part) == layout
        assert as_images(as_rows(part), part).is_contiguous(memory_format=layout)
        assert torch.equal(as_images(as_rows(part), part), part)
        assert F.simple_gate(part).is_contiguous(memory_format=layout)


def test_what_is_in_both_formats_at_once_has_one() -> None:
    for shape in ((2, 4, 1, 1), (2, 1, 3, 5)):
        x = torch.randn(shape)
        assert memory_format(x) == torch.contiguous_format
        assert torch.equal(as_images(as_rows(x), x), x)
