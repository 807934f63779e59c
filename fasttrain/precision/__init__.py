"""How a tensor is kept: the codecs, and the policy that chooses them."""
