"""Discovery of attention modules from the model itself."""

from collections import Counter

import pytest
from torch import Tensor, nn

from families import Family, build
from hf_prefix import UnsupportedModelError
from hf_prefix.attention.discovery import find_sites
from hf_prefix.attention.sites import mask_argument


def test_sites_have_the_roles_and_shapes_of_the_family(family: Family) -> None:
    sites = find_sites(build(family))
    found = {
        (role, site.heads, site.key_size): count
        for role, count in Counter(site.role for site in sites).items()
        for site in sites
        if site.role == role
    }
    assert found == {(role, heads, size): count for role, (count, heads, size) in family.shape.items()}
    assert all(site.value_size == site.key_size for site in sites)


def test_attention_without_a_mask_argument_is_refused() -> None:
    class Maskless(nn.Module):
        def forward(self, hidden_states: Tensor, past_key_values: object = None) -> Tensor:
            return hidden_states

    with pytest.raises(UnsupportedModelError, match="Maskless takes its mask in none of the arguments"):
        mask_argument(Maskless(), "decoder")
