"""GoRA, the paper (He et al., NeurIPS 2025): pure functions on numbers and tensors. No disk, no models.

Orientation is torch's: W and G are (out, in), A is (r, in), B is (out, r), and the update is scale * B @ A.
The paper writes x W with W (m, n), so its m is our `in`, its n our `out`, its A our Aᵀ and its B our Bᵀ.
"""
