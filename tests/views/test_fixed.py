"""The fixed views against pixels by hand."""

import pytest
import torch

from lightning_tta.views.fixed import fixed_views
from nets import make_images


@pytest.mark.parametrize("number", [1, 2, 3])
def test_image_middle_and_mirror_image(number):
    images = make_images(2, size=20)
    views = fixed_views(images, number)
    assert views.shape == (number, *images.shape)
    assert torch.equal(views[0], images)
    if number > 1:
        ramp = torch.arange(20.0).expand(1, 1, 20, 20) / 20
        middle = fixed_views(ramp, 2)[1]
        # pixel i of 20 lies at (i + 0.5) * 18 / 20 - 0.5 of the 18 that start at 1
        places = ((torch.arange(20) + 0.5) * 0.9 - 0.5).clamp(0, 17) + 1
        torch.testing.assert_close(middle, (places / 20).expand_as(middle))
    if number > 2:
        assert torch.equal(views[2], images.flip(3))


def test_one_pixel():
    assert torch.equal(fixed_views(torch.ones(1, 3, 1, 1), 3), torch.ones(3, 1, 3, 1, 1))
